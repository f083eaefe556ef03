"""Write docs/parity.md: every sharding against one process.

    python benchmarks/parity.py

Takes some minutes on two cores. The same runs, with bounds, are tests/equal/test_sharding.py.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from beside import beside_one_process  # noqa: E402
from layouts import LAYOUTS, OPTIONS, STEPS, relative_error, run  # noqa: E402
from ranks import run_ranks  # noqa: E402
from tqdm import tqdm  # noqa: E402

NOISE = "k_proj.bias"
CLIP = 0.5
RULES = [
    ("auto", "schedule_free"),
    ("adam_mini", "schedule_free"),
    ("tensor", "schedule_free"),
    ("element", "schedule_free"),
    ("adam_mini", "ema"),
]
FP64_RULES = [("auto", "schedule_free"), ("tensor", "ema")]
BF16_RULES = [("adam_mini", "schedule_free", False), ("tensor", "ema", True)]
HEAD = f"""# Every sharding against one process

Made by `python benchmarks/parity.py`: torch {torch.__version__}, gloo, CPU, Python {platform.python_version()}. A small GQA
transformer (tests/models.py), fp32, {STEPS} steps, {OPTIONS}, gradients clipped to a global norm of
{CLIP}. "even" has heads that fit their shards, "uneven" cuts heads and leaves ranks without a part.

Errors are relative, per tensor (norm of the difference over norm), the worst of all tensors, ranks and the block rules
{", ".join(f"{blocks}/{averaging}" for blocks, averaging in RULES)}. `{NOISE}` is left out: under softmax its true gradient
is zero, and what arrives is rounding noise. Collectives and floats are per step, with blocks "auto" and "tensor".

The fp64 column is the worst of y, x and second moments under auto/schedule_free and tensor/ema. In bf16 the gradients
depend on the sharding (sums over ranks, rounded to eight bits), so there one process is given the very gradients that
the shards were given, for 6 steps of adam_mini/schedule_free and, with `deterministic=True`, tensor/ema: how many numbers
of y and x differ, and the worst error of the second moments, which are fp32.

| layout | ranks | shape | y | x | second moments | fp64 | bf16 y, x / second moments | all-reduces auto / tensor | floats auto / tensor |
|---|---|---|---|---|---|---|---|---|---|
"""


def in_every_dtype(layout: str, shape: str) -> tuple:
    return (
        run(layout, shape, torch.float32, RULES, CLIP),
        run(layout, shape, torch.float64, FP64_RULES, CLIP),
        beside_one_process(layout, shape, torch.bfloat16, BF16_RULES),
    )


def worst_errors(ours: dict, theirs: dict) -> dict[str, float]:
    worst = {"y": 0.0, "x": 0.0, "v": 0.0}
    for rule, (values, _) in ours.items():
        for what, value in values.items():
            error, _ = relative_error(value, theirs[rule][0][what], NOISE)
            worst[what] = max(worst[what], error)
    return worst


def different(ours: dict, theirs: dict) -> int:
    return sum(int((value != theirs[name]).sum()) for name, value in ours.items())


def row(layout: str, world_size: int, shape: str, expected: dict) -> str:
    worst = {"y": 0.0, "x": 0.0, "v": 0.0}
    fp64 = bf16_moments = 0.0
    bf16_weights = 0
    for ours, ours64, pairs in run_ranks(world_size, in_every_dtype, layout, shape):
        found = worst_errors(ours, expected[shape, torch.float32])
        worst = {what: max(worst[what], error) for what, error in found.items()}
        fp64 = max(fp64, *worst_errors(ours64, expected[shape, torch.float64]).values())
        for values in pairs.values():
            bf16_weights = max(bf16_weights, different(*values["y"]), different(*values["x"]))
            bf16_moments = max(bf16_moments, relative_error(*values["v"])[0])
    auto, tensor = (ours[blocks, "schedule_free"][1] for blocks in ("auto", "tensor"))
    errors = " | ".join(f"{error:.1e}" for error in [*worst.values(), fp64])
    counts = " | ".join(f"{a} / {b}" for a, b in zip(auto, tensor, strict=True))
    bf16 = f"{bf16_weights} / {bf16_moments:.1e}"
    return f"| {layout} | {world_size} | {shape} | {errors} | {bf16} | {counts} |"


def main() -> None:
    cases = [
        (layout, world_size, shape)
        for layout, settings in LAYOUTS.items()
        for world_size in settings.world_sizes
        for shape in settings.shapes
    ]
    expected = {
        (shape, dtype): run(None, shape, dtype, rules, CLIP)
        for shape in ("even", "uneven")
        for dtype, rules in ((torch.float32, RULES), (torch.float64, FP64_RULES))
    }
    rows = [row(*case, expected) for case in tqdm(cases)]
    (ROOT / "docs" / "parity.md").write_text(HEAD + "\n".join(rows) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
