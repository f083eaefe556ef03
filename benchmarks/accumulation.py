"""Accumulation into the state beside accumulation in the gradients: what the difference costs.

    python -m benchmarks.accumulation run       # adds to results/accumulation.jsonl what is missing
    python -m benchmarks.accumulation report    # results/accumulation.md and .png

The model, the text and the batch of 16 sequences are those of `benchmarks.convergence`; a step is
cut into N micro-batches. Accumulated in the gradients (exact) every N is the same run, N = 1.
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from amsf_dist import AMSF, enable_gradient_release
from amsf_dist.train.batches import TrainBatches
from benchmarks.convergence import record
from benchmarks.convergence.text import Text, load_text
from benchmarks.convergence.train import held_out_loss
from benchmarks.convergence.trainee import BATCH_SIZE, SEQUENCE_LENGTH, Trainee, Working

STEPS, EVALUATE_EVERY, SEEDS = 500, 50, (0, 1, 2)
PARTS = (1, 2, 4, 8, 16)
OPTIONS: dict[str, Any] = {
    "lr": 4e-3,
    "betas": (0.9, 0.99),
    "r": 2.0,
    "warmup_steps": 150,
    "weight_decay": 0.1,
    "decay": "matrices",
}
RECORD = record.RESULTS / "accumulation.jsonl"
Averaging = Annotated[list[str], typer.Argument(help="schedule_free, ema; none: both.")]
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def train(averaging: str, parts: int, seed: int, text: Text, working: Working) -> dict[str, Any]:
    """One run; every backward moves weights inside it."""
    trainee = Trainee(working, "fp32", seed)
    optimizer = AMSF(trainee.owned, averaging=averaging, **OPTIONS)
    handle = enable_gradient_release(trainee.owned, optimizer, accumulation="state")
    batches = TrainBatches(text.train, SEQUENCE_LENGTH, BATCH_SIZE, seed)
    size, curve = BATCH_SIZE // parts, []
    for step in tqdm(range(STEPS), desc=f"{averaging} N={parts} seed {seed}", mininterval=10):
        for part in range(parts):
            optimizer.optimizer_accumulation = part < parts - 1
            windows = batches.micro_batch(step, part * size, size)
            (trainee.losses(windows).mean() / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % EVALUATE_EVERY == 0:
            curve.append([step + 1, held_out_loss(trainee, optimizer, text)])
    handle.remove()
    known = {"averaging": averaging, "parts": parts, "seed": seed, "curve": curve}
    return {**known, "hardware": record.hardware("cpu"), "versions": record.versions()}


@app.command()
def run(averagings: Averaging = ["schedule_free", "ema"]) -> None:  # noqa: B006  (typer's way)
    """Run what is not in the record yet."""
    torch.set_num_threads(1)
    text, working = load_text(), Working("cpu", compiled=True)
    for seed in SEEDS:
        for averaging in averagings:
            for parts in PARTS:
                if not _runs(averaging, parts, seed):
                    record.append(RECORD, train(averaging, parts, seed, text, working))


@app.command()
def report() -> None:
    """Write the table and the picture."""
    sections = [_HEAD.format(**_circumstances())]
    for averaging in ("schedule_free", "ema"):
        if _runs(averaging, 1):
            sections.append(_table(averaging))
    target = RECORD.with_suffix(".md")
    target.write_text("\n\n".join(sections) + "\n")
    typer.echo(f"{target}\n{_draw()}")


def _runs(averaging: str, parts: int, seed: int | None = None) -> list[dict[str, Any]]:
    return [
        found
        for found in record.read(RECORD)
        if (found["averaging"], found["parts"]) == (averaging, parts)
        and seed in (None, found["seed"])
    ]


def _table(averaging: str) -> str:
    lines = [
        f"## {averaging}\n",
        "| N | runs | held-out loss | spread | to exact, same seed (lowest .. highest) |",
        "|---|---|---|---|---|",
    ]
    exact = {found["seed"]: found["curve"][-1][1] for found in _runs(averaging, 1)}
    for parts in PARTS:
        last = {found["seed"]: found["curve"][-1][1] for found in _runs(averaging, parts)}
        losses = [loss for loss in last.values() if loss is not None]
        if not losses:
            continue
        spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        to = [100 * (last[s] / exact[s] - 1) for s in last if last[s] and exact.get(s)]
        name = "exact" if parts == 1 else f"{parts}, state"
        against = f"{statistics.fmean(to):+.2f} % ({min(to):+.2f} .. {max(to):+.2f})"
        lines.append(
            f"| {name} | {len(losses)} | {statistics.fmean(losses):.4f} | {spread} | "
            f"{'' if parts == 1 else against} |"
        )
    return "\n".join(lines)


def _draw() -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    colors = ["#264653", "#1f6f8b", "#5b8c5a", "#e9a03b", "#d1603d"]
    for axis, averaging in zip(figure.subplots(1, 2), ("schedule_free", "ema"), strict=True):
        for parts, color in zip(PARTS, colors, strict=True):
            by_step: dict[int, list[float]] = {}
            for found in _runs(averaging, parts):
                for step, loss in found["curve"]:
                    by_step.setdefault(step, []).append(loss)
            shown = {step: statistics.fmean(v) for step, v in by_step.items() if step >= 100}
            label = "exact" if parts == 1 else f"state, N = {parts}"
            axis.plot(list(shown), list(shown.values()), color=color, label=label, linewidth=1.5)
        axis.set(title=averaging, xlabel="step", ylabel="held-out nats per byte")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    path = RECORD.with_suffix(".png")
    figure.savefig(path, dpi=110)
    return str(path)


def _circumstances() -> dict[str, Any]:
    found = record.read(RECORD)
    versions = found[-1]["versions"]
    return {
        "steps": STEPS,
        "options": ", ".join(f"{key}={value}" for key, value in OPTIONS.items()),
        "hardware": "; ".join(sorted({one["hardware"] for one in found})),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "seeds": ", ".join(str(seed) for seed in sorted({one["seed"] for one in found})),
    }


_HEAD = """\
# Accumulation into the state: the same batches, cut into N micro-batches

    python -m benchmarks.accumulation run
    python -m benchmarks.accumulation report

The model and text of [convergence.md](convergence.md), {steps} steps of 16 x 128 bytes cut into N parts; seeds {seeds}.
AMSF({options}). `accumulation="exact"` is the same for every N and stands for all. Loss on 512 held-out windows, at x for
schedule_free; spread: standard deviation over the seeds. {hardware}. {versions}.

![Held-out loss](accumulation.png)"""


if __name__ == "__main__":
    app()
