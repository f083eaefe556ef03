"""Time one optimizer step on the CPU, all peers side by side on the same tensors.

    python benchmarks/step_time.py [--shapes llama gpt2 resnet50] [--seconds 60] [--out FOLDER]

Peers take turns, round after round, so that whatever else the machine does hits all alike; the
table gives the median of every peer over the median of torch.optim.AdamW(fused=True), and between
which ratios 80 % of the rounds lie. Measure on an idle machine: what another process takes of a
core or of the memory is no optimizer's property. Peers that are not installed are left out by name.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amsf_dist import AMSF

BASE = "AdamW(fused)"
PACKAGES = "torch schedulefree adam_mini torch-optimi pytorch_optimizer deepspeed".split()
LR = 1e-5
Shapes = dict[str, tuple[int, ...]]


def gpt2() -> Shapes:
    """124M, whole: every tensor of it."""
    dim, found = 768, {"wte.weight": (50257, 768), "wpe.weight": (1024, 768)}
    for layer in range(12):
        at = f"h.{layer}"
        for norm in ("ln_1", "ln_2"):
            found |= {f"{at}.{norm}.weight": (dim,), f"{at}.{norm}.bias": (dim,)}
        for name, rows, columns in (
            ("attn.c_attn", 3 * dim, dim),
            ("attn.c_proj", dim, dim),
            ("mlp.c_fc", 4 * dim, dim),
            ("mlp.c_proj", dim, 4 * dim),
        ):
            found |= {f"{at}.{name}.weight": (rows, columns), f"{at}.{name}.bias": (rows,)}
    return found | {"ln_f.weight": (dim,), "ln_f.bias": (dim,)}


def llama() -> Shapes:
    """The parameters of Llama-3-8B with widths divided by 4, 6 of 32 layers, 1/8 of the vocabulary."""
    dim, kv, hidden, vocab = 1024, 256, 3584, 16032
    found: Shapes = {"embed_tokens.weight": (vocab, dim)}
    for layer in range(6):
        at = f"layers.{layer}"
        found |= {
            f"{at}.self_attn.q_proj.weight": (dim, dim),
            f"{at}.self_attn.k_proj.weight": (kv, dim),
            f"{at}.self_attn.v_proj.weight": (kv, dim),
            f"{at}.self_attn.o_proj.weight": (dim, dim),
            f"{at}.mlp.gate_proj.weight": (hidden, dim),
            f"{at}.mlp.up_proj.weight": (hidden, dim),
            f"{at}.mlp.down_proj.weight": (dim, hidden),
            f"{at}.input_layernorm.weight": (dim,),
            f"{at}.post_attention_layernorm.weight": (dim,),
        }
    return found | {"norm.weight": (dim,), "lm_head.weight": (vocab, dim)}


def resnet50() -> Shapes:
    """Whole: 161 tensors, most of them small."""
    found: Shapes = {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "bn1.bias": (64,)}
    before = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            convs = [
                ("conv1", (width, before, 1, 1)),
                ("conv2", (width, width, 3, 3)),
                ("conv3", (4 * width, width, 1, 1)),
            ]
            if not block:
                convs.append(("downsample.0", (4 * width, before, 1, 1)))
            for name, shape in convs:
                norm = name.replace("conv", "bn").replace("sample.0", "sample.1")
                found |= {f"{at}.{name}.weight": shape}
                found |= {f"{at}.{norm}.{kind}": (shape[0],) for kind in ("weight", "bias")}
            before = 4 * width
    return found | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


SHAPES: dict[str, Callable[[], Shapes]] = {"llama": llama, "gpt2": gpt2, "resnet50": resnet50}


def tensors(shapes: Shapes, dtype: torch.dtype) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    named = []
    for name, shape in shapes.items():
        param = nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype))
        param.grad = (torch.randn(shape, generator=generator) * 0.01).to(dtype)
        named.append((name, param))
    return named


def peers(fp32: list[tuple[str, nn.Parameter]], bf16: list[tuple[str, nn.Parameter]]) -> Any:
    """Name -> a function that builds the optimizer."""
    plain = [param for _, param in fp32]

    def copies(named: list[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
        """For optimi, which scales gradients in place: after some steps they are no numbers."""
        found = []
        for _, param in named:
            found.append(nn.Parameter(param.detach().clone()))
            found[-1].grad = param.grad.clone()
        return found

    def schedulefree() -> Any:
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(plain, lr=LR)
        optimizer.train()
        return optimizer

    def adam_mini() -> Any:
        from adam_mini import Adam_mini

        return Adam_mini(fp32, lr=LR, dim=1024, n_heads=8, verbose=False)

    def optimi(params: list[nn.Parameter], **options: Any) -> Any:
        from optimi import AdamW

        return AdamW(params, lr=LR, **options)

    def pytorch_optimizer() -> Any:
        from pytorch_optimizer import ScheduleFreeAdamW

        optimizer = ScheduleFreeAdamW(plain, lr=LR)
        optimizer.train()
        return optimizer

    def deepspeed() -> Any:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(plain, lr=LR)

    small = {"weight_storage": "bf16+8", "state_storage": "int8", "lr": LR}
    tiny = {"weight_storage": "stochastic", "state_storage": "int8", "lr": LR}
    half_state = {"weight_storage": "bf16+8", "state_storage": "bf16", "lr": LR}
    return {
        BASE: lambda: torch.optim.AdamW(plain, lr=LR, fused=True),
        "AMSF fp32": lambda: AMSF(fp32, lr=LR),
        "AMSF fp32, factored": lambda: AMSF(fp32, lr=LR, blocks="factored"),
        "AMSF fp32, one pass": lambda: AMSF(fp32, lr=LR, nonfinite="block"),
        "AMSF bf16+8, bf16 gap": lambda: AMSF(bf16, **half_state),
        "AMSF 4.06 bytes: bf16+8, int8 gap": lambda: AMSF(bf16, **small),
        "AMSF 3.06 bytes: stochastic, int8 gap": lambda: AMSF(bf16, **tiny),
        "AMSF 4.06 bytes, one pass": lambda: AMSF(bf16, **small, nonfinite="block"),
        "DeepSpeedCPUAdam": deepspeed,
        "AdamW(foreach)": lambda: torch.optim.AdamW(plain, lr=LR, foreach=True),
        "schedulefree AdamW": schedulefree,
        "adam-mini": adam_mini,
        "optimi AdamW": lambda: optimi(copies(fp32), foreach=False),
        "optimi AdamW, bf16 Kahan": lambda: optimi(copies(bf16), foreach=False),
        "pytorch_optimizer ScheduleFreeAdamW": pytorch_optimizer,
    }


def measure(shapes: Shapes, seconds: float, only: list[str]) -> dict[str, list[float] | str]:
    """Seconds per step of every round, or why a peer is left out."""
    found: dict[str, list[float] | str] = {}
    optimizers = {}
    fp32, bf16 = tensors(shapes, torch.float32), tensors(shapes, torch.bfloat16)
    for name, build in peers(fp32, bf16).items():
        if only and name != BASE and not any(word in name for word in only):
            continue
        try:
            optimizer = build()
            for _ in range(2):
                optimizer.step()
        except Exception as error:  # what is missing, or refuses this machine, is named
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:90]
            continue
        optimizers[name], found[name] = optimizer, []
    end = time.perf_counter() + seconds
    rounds = 0
    gc.disable()
    while time.perf_counter() < end or rounds < 5:
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            found[name].append(time.perf_counter() - start)  # type: ignore[union-attr]
        rounds += 1
    gc.enable()
    for name, optimizer in optimizers.items():  # a step that is skipped is a fast one
        if getattr(optimizer, "skipped_steps", 0):
            raise RuntimeError(f"{name} has skipped {optimizer.skipped_steps} steps")
    return found


def rows(times: dict[str, list[float] | str]) -> list[tuple[str, float, float, float, float]]:
    base = statistics.median(times[BASE])  # type: ignore[arg-type]
    made = []
    for name, seconds in times.items():
        if not isinstance(seconds, str):
            steps = sorted(seconds)
            median = statistics.median(steps)
            low, high = steps[len(steps) // 10], steps[len(steps) * 9 // 10]
            made.append((name, median * 1e3, median / base, low / base, high / base))
    return made


def table(name: str, shapes: Shapes, times: dict[str, list[float] | str]) -> str:
    numel = sum(torch.Size(shape).numel() for shape in shapes.values())
    rounds = len(times[BASE])
    lines = [
        f"## {name}: {len(shapes)} tensors, {numel / 1e6:.1f}M parameters, {rounds} rounds",
        "",
        "| | ms | ratio | 80 % of rounds |",
        "|---|---|---|---|",
    ]
    for peer, ms, ratio, low, high in rows(times):
        lines.append(f"| {peer} | {ms:.1f} | {ratio:.2f} | {low:.2f} .. {high:.2f} |")
    left_out = [f"{peer} ({why})" for peer, why in times.items() if isinstance(why, str)]
    if left_out:
        lines += ["", "Left out: " + "; ".join(left_out)]
    return "\n".join([*lines, ""])


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    try:
        info = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            pass
    return f"{cpu}, {torch.get_num_threads()} threads; {', '.join(found)}"


def draw(all_times: dict[str, dict[str, list[float] | str]], out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 1.2 + 3.4 * len(all_times)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(all_times), 1, squeeze=False)[:, 0]
    for axis, (name, times) in zip(axes, all_times.items(), strict=True):
        made = rows(times)
        names, ratios = [row[0] for row in made], [row[2] for row in made]
        colors = ["#9c2c2c" if peer.startswith("AMSF") else "#8ab6c1" for peer in names]
        axis.barh(names, ratios, color=colors, height=0.66)
        for place, ratio in enumerate(ratios):
            axis.text(ratio, place, f" {ratio:.2f}", va="center", fontsize=8)
        axis.axvline(1.0, color="#264653", linewidth=0.8)
        axis.invert_yaxis()
        axis.set(title=name, xlabel=f"time of a step over that of {BASE}")
        axis.tick_params(axis="y", length=0, labelsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each set of shapes")
    parser.add_argument("--only", nargs="*", default=[], help="peers whose names have these words")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    default = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    all_times, text = {}, [f"# Time of a CPU step\n\n{machine()}\n"]
    for name in options.shapes:
        shapes = SHAPES[name]()
        all_times[name] = measure(shapes, options.seconds, options.only)
        text.append(table(name, shapes, all_times[name]))
        print(text[-1], flush=True)
        gc.collect()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "step_time_cpu.md").write_text("\n".join(text))
    (options.out / "step_time_cpu.json").write_text(json.dumps(all_times))
    draw(all_times, options.out / "step_time_cpu.png")


if __name__ == "__main__":
    main()
