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
HEAD = f"""# Every sharding against one process

Made by `python benchmarks/parity.py`: torch {torch.__version__}, gloo, CPU, Python {platform.python_version()}. A small GQA
transformer (tests/models.py), fp32, {STEPS} steps, {OPTIONS}, gradients clipped to a global norm of
{CLIP}. "even" has heads that fit their shards, "uneven" cuts heads and leaves ranks without a part.

Errors are relative, per tensor (norm of the difference over norm), the worst of all tensors, ranks and the block rules
{", ".join(f"{blocks}/{averaging}" for blocks, averaging in RULES)}. `{NOISE}` is left out: under softmax its true gradient
is zero, and what arrives is rounding noise. Collectives and floats are per step, with blocks "auto" and "tensor".

| layout | ranks | shape | y | x | second moments | all-reduces auto / tensor | floats auto / tensor |
|---|---|---|---|---|---|---|---|
"""


def row(layout: str, world_size: int, shape: str, expected: dict) -> str:
    worst = {"y": 0.0, "x": 0.0, "v": 0.0}
    for ours in run_ranks(world_size, run, layout, shape, torch.float32, RULES, CLIP):
        for rule, (values, _) in ours.items():
            for what, value in values.items():
                error, _ = relative_error(value, expected[rule][0][what], NOISE)
                worst[what] = max(worst[what], error)
    auto, tensor = (ours[blocks, "schedule_free"][1] for blocks in ("auto", "tensor"))
    errors = " | ".join(f"{error:.1e}" for error in worst.values())
    counts = " | ".join(f"{a} / {b}" for a, b in zip(auto, tensor, strict=True))
    return f"| {layout} | {world_size} | {shape} | {errors} | {counts} |"


def main() -> None:
    cases = [
        (layout, world_size, shape)
        for layout, settings in LAYOUTS.items()
        for world_size in settings.world_sizes
        for shape in settings.shapes
    ]
    expected = {shape: run(None, shape, torch.float32, RULES, CLIP) for shape in ("even", "uneven")}
    rows = [row(*case, expected[case[2]]) for case in tqdm(cases)]
    (ROOT / "docs" / "parity.md").write_text(HEAD + "\n".join(rows) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
