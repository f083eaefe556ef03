"""Gradient release beside the ordinary step: the peak of live memory, and time, one process.

    python -m benchmarks.release [--device cuda] [--rounds 15]

Writes benchmarks/results/release.md. Every optimizer trains the same small Llama on the same tokens; the
ordinary step and release take turns within one run. optimi and, on a GPU, FlashOptim are the peers
that release gradients too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from amsf_dist import AMSF, enable_gradient_release
from benchmarks.convergence import record
from benchmarks.live_storages import LiveStorages

BF16, FP32 = torch.bfloat16, torch.float32
SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
    "max_position_embeddings": 64,
    "use_cache": False,
}
BATCH, LENGTH = 1, 32  # few activations: what is compared is weights, state and gradients
Step = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Entry:
    """An optimizer with and without release: `build` gives the step of one of them."""

    name: str
    dtype: torch.dtype
    build: Callable[[nn.Module, bool], Step]


def amsf(**options: Any) -> Callable[[nn.Module, bool], Step]:
    def build(model: nn.Module, release: bool) -> Step:
        optimizer = AMSF(model, lr=1e-4, **options)
        if release:
            enable_gradient_release(model, optimizer)
        return _loop(model, optimizer)

    return build


def adamw(model: nn.Module, release: bool) -> Step:
    if release:
        raise NotImplementedError
    return _loop(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))


def optimi(model: nn.Module, release: bool) -> Step:
    from optimi import AdamW, prepare_for_gradient_release

    optimizer = AdamW(model.parameters(), lr=1e-4, gradient_release=release)
    if release:
        prepare_for_gradient_release(model, optimizer)
    return _loop(model, optimizer)


def flash(model: nn.Module, release: bool) -> Step:
    from flashoptim import FlashAdamW
    from flashoptim import enable_gradient_release as enable

    optimizer = FlashAdamW(model.parameters(), lr=1e-4)
    if release:
        enable(model, optimizer)
    return _loop(model, optimizer)


def _loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(tokens: torch.Tensor) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


ENTRIES = [
    Entry("AdamW (fused), fp32", FP32, adamw),
    Entry("optimi AdamW, fp32", FP32, optimi),
    Entry("optimi AdamW, bf16 + Kahan", BF16, optimi),
    Entry("AMSF, fp32", FP32, amsf()),
    Entry("AMSF, bf16+8 and bf16 gap", BF16, amsf(state_storage="bf16")),
    Entry("AMSF, bf16+8 and int8 gap", BF16, amsf(state_storage="int8")),
    Entry(
        "AMSF, stochastic and int8 gap",
        BF16,
        amsf(weight_storage="stochastic", state_storage="int8"),
    ),
]
ON_GPU = [Entry("FlashAdamW", BF16, flash)]


def _started(entry: Entry, release: bool, device: str) -> tuple[nn.Module, Step, torch.Tensor]:
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(entry.dtype)
        tokens = torch.randint(SHAPE["vocab_size"], (BATCH, LENGTH))
    return model, entry.build(model, release), tokens


def peak(entry: Entry, release: bool, device: str) -> float:
    """Bytes per parameter at the fullest moment of the third step, activations included."""
    if device == "cuda":
        model, step, tokens = _started(entry, release, device)
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            step(tokens)
        found = torch.cuda.max_memory_allocated()
    else:
        with LiveStorages() as live:
            model, step, tokens = _started(entry, release, device)
            for _ in range(3):
                live.forget_peak()
                step(tokens)
            found = live.peak_bytes
    return found / sum(param.numel() for param in model.parameters())


def ratios(entry: Entry, device: str, rounds: int) -> list[float]:
    """Time of a whole training step with release to that without, in turns."""
    found: list[float] = []
    steps = [_started(entry, release, device)[1:] for release in (True, False)]
    for number in range(rounds + 2):
        seconds = []
        for step, tokens in steps:
            began = time.perf_counter()
            step(tokens)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        if number >= 2:  # the first ones plan and allocate
            found.append(seconds[0] / seconds[1])
    return found


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=3, help="Steps timed, in turns.")] = 15,
) -> None:
    """Measure all and write the table."""
    lines = [_HEAD.format(**_circumstances(device, rounds))]
    for entry in ENTRIES + (ON_GPU if device == "cuda" else []):
        ordinary = peak(entry, False, device)
        cells = [f"{ordinary:.2f}", "", "", ""]
        if entry.build is not adamw:
            released = peak(entry, True, device)
            times = ratios(entry, device, rounds)
            low, high = statistics.quantiles(times, n=4)[::2]
            cells[1:] = [f"{released:.2f}", f"{released - ordinary:+.2f}"]
            cells.append(f"{statistics.median(times):.2f} ({low:.2f} .. {high:.2f})")
        lines.append(f"| {entry.name} | {' | '.join(cells)} |")
        typer.echo(lines[-1])
    target = record.RESULTS / "release.md"
    target.write_text("\n".join(lines) + "\n")
    typer.echo(str(target))


def _circumstances(device: str, rounds: int) -> dict[str, Any]:
    packages = ["torch", "transformers", "torch-optimi"]
    with torch.device("meta"):
        numel = sum(param.numel() for param in LlamaForCausalLM(LlamaConfig(**SHAPE)).parameters())
    return {
        "numel": numel,
        "tokens": BATCH * LENGTH,
        "rounds": rounds,
        "device": device,
        "hardware": record.hardware(device).replace(
            "1 thread", f"{torch.get_num_threads()} threads"
        ),
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in packages),
        "how": "the allocator's peak"
        if device == "cuda"
        else "the sum of live storages, seen by a dispatch mode",
    }


_HEAD = """\
# Gradient release beside the ordinary step

    python -m benchmarks.release --device {device} --rounds {rounds}

A Llama of {numel:,} parameters, {tokens} tokens a step (so that activations are few), one process, seed 0. Bytes per
parameter at the fullest moment of a step, {how}: weights, state, gradients, activations and temporaries. Time: a whole
training step with release to one without, taken in turns, median (quartiles) of {rounds}. {hardware}. {versions}.

| | ordinary step | gradient release | difference | time, release to ordinary |
|---|---|---|---|---|"""


if __name__ == "__main__":
    typer.run(main)
