"""What a step costs on many ranks: constants measured here, and a model of cost made of them.

    torchrun --nproc-per-node 4 benchmarks/scaling.py [--out FILE.md]

Measures on whatever the processes run on (CPU and gloo, or GPU and NCCL): the copy bandwidth of a
rank, the time of an all-reduce by its size, the host's time per tensor of a step. The payloads are
no model: they are counted from the plan of each size (`amsf_dist.explain(mesh=)`). docs/scaling.md
says what the table leaves out.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from amsf_dist import AMSF, explain
from amsf_dist.train.known_models import KNOWN_MODELS

RANKS = (8, 64, 1024)
MODELS = ("llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b")
MOVED = {"fp32": 24, "4.06 bytes": 12}
"""Bytes that a step reads and writes per number, the gradient twice (docs/speed.md)."""
PAYLOADS = (1, 64, 1024, 16 * 1024, 256 * 1024, 2 * 1024**2)


class Constants(NamedTuple):
    """Measured.

    Attributes:
        copy: bytes per second that a copy reads and writes, all ranks at once.
        latency: seconds of an all-reduce of one float.
        per_float: further seconds for each float.
        per_tensor: seconds of the host for each tensor of a step.
        ranks: that took part.
    """

    copy: float
    latency: float
    per_float: float
    per_tensor: float
    ranks: int


def seconds(work: Callable[[], object], device: torch.device, rounds: int = 30) -> float:
    """Median time of some work that every rank does at the same time."""
    found = []
    for number in range(rounds + 3):
        dist.barrier()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def measured(device: torch.device) -> tuple[Constants, list[tuple[int, float]]]:
    """The constants, and (floats, seconds) of the all-reduces that they come from."""
    here, there = (torch.ones(2**26, device=device) for _ in range(2))
    copied = 2 * here.numel() * 4 / seconds(lambda: there.copy_(here), device)
    reduced = []
    for floats in PAYLOADS:
        payload = torch.zeros(floats, device=device)
        reduced.append((floats, seconds(lambda payload=payload: dist.all_reduce(payload), device)))
    (few, short), (many, long) = reduced[0], reduced[-1]
    per_float = max(0.0, (long - short) / (many - few))
    return Constants(copied, short, per_float, _per_tensor(device), dist.get_world_size()), reduced


def _per_tensor(device: torch.device) -> float:
    times = []
    for count in (100, 1000):
        names = [f"layers.{number}.mlp.up_proj.weight" for number in range(count)]
        params = [nn.Parameter(torch.ones(16, 16, device=device)) for _ in names]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = AMSF(zip(names, params, strict=True), lr=1e-3)
        times.append(seconds(optimizer.step, device, 20))
    return (times[1] - times[0]) / 900


def plans(name: str) -> tuple[int, int, dict[tuple[int, str], int]]:
    """Parameters and tensors of a model, and floats sent by (ranks, blocks)."""
    import transformers

    kind, arguments = KNOWN_MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **arguments)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    cut = {
        (ranks, blocks): explain(model, mesh=ranks, blocks=blocks).cut_blocks
        for ranks in RANKS
        for blocks in ("auto", "factored")
    }
    floats = {key: number + 1 if number else 0 for key, number in cut.items()}  # 0: no collective
    params = list(model.parameters())
    return sum(param.numel() for param in params), len(params), floats


def rows(name: str, constants: Constants) -> list[str]:
    """The table's lines for a model."""
    numel, tensors, floats = plans(name)
    found = []
    for ranks in RANKS:
        # latency grows with the depth of a tree, the time per float does not grow with the ranks
        depth = math.log2(ranks) / max(1.0, math.log2(constants.ranks))
        sent = [floats[ranks, blocks] for blocks in ("auto", "factored")]
        reduce = [
            constants.latency * depth + constants.per_float * number if number else 0.0
            for number in sent
        ]
        move = [numel / ranks * moved / constants.copy for moved in MOVED.values()]
        found.append(
            f"| {name} | {ranks:,} | {numel / ranks / 1e6:,.1f}M | "
            + " | ".join(f"{value * 1e3:,.1f}" for value in move)
            + f" | {tensors * constants.per_tensor * 1e3:.1f} | "
            + " | ".join(
                f"{number:,}: {time * 1e3:.2f}" for number, time in zip(sent, reduce, strict=True)
            )
            + " |"
        )
    return found


def report(constants: Constants, reduced: Sequence[tuple[int, float]], device: str) -> str:
    """Markdown."""
    lines = [
        "# A model of cost",
        "",
        f"    torchrun --nproc-per-node {constants.ranks} benchmarks/scaling.py",
        "",
        f"Measured on {constants.ranks} ranks, {device}, torch {torch.__version__}:",
        "",
        f"- a copy reads and writes {constants.copy / 1e9:.1f} GB/s on each rank, all at once;",
        "- an all-reduce of "
        + ", ".join(f"{floats:,} floats takes {time * 1e6:,.0f} us" for floats, time in reduced)
        + ";",
        f"- the host needs {constants.per_tensor * 1e6:.1f} us for each tensor of a step.",
        "",
        "What follows for a step of each rank, in ms; the memory traffic at the speed of that copy:",
        "",
        f"| model | ranks | numbers a rank | {' | '.join(MOVED)} | host | "
        "floats sent: all-reduce, auto | factored |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        lines += rows(name, constants)
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, and print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    found = measured(device)
    if dist.get_rank() == 0:
        named = torch.cuda.get_device_name(device) if on_gpu else "CPU and gloo"
        text = report(*found, named)
        print(text)
        if options.out is not None:
            options.out.write_text(text)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
