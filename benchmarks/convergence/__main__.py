"""python -m benchmarks.convergence list | run SET... | report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.convergence import record
from benchmarks.convergence.plan import SETS, settings_of
from benchmarks.convergence.setting import STEPS

RECORD = record.RESULTS / "convergence.jsonl"
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
RecordPath = Annotated[Path, typer.Option("--record", help="Lines of JSON, one a run.")]


@app.command("list")
def list_settings(path: RecordPath = RECORD) -> None:
    """Show every set and setting, and how many of its runs are done."""
    records = record.read(path)
    for word, settings in SETS.items():
        typer.echo(word)
        for setting in settings:
            done = sum(record.find(records, setting, s, STEPS) is not None for s in setting.seeds)
            typer.echo(f"  {setting.name:36} {done} of {len(setting.seeds)} runs")


@app.command()
def run(
    words: Annotated[list[str], typer.Argument(help="Sets or settings, see list.")],
    path: RecordPath = RECORD,
    steps: Annotated[int, typer.Option(min=1, help="Fewer only to try it out.")] = STEPS,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compiled: Annotated[bool, typer.Option(help="Compile the model: the same, sooner.")] = True,
) -> None:
    """Run what is not in the record yet: seed by seed, so that all get one before any gets two."""
    import torch

    from benchmarks.convergence.text import load_text
    from benchmarks.convergence.train import train
    from benchmarks.convergence.trainee import Working

    settings = settings_of(words)
    torch.set_num_threads(1)
    text, working = load_text(), Working(device, compiled)
    seeds = sorted({seed for setting in settings for seed in setting.seeds})
    for seed in seeds:
        for setting in (s for s in settings if seed in s.seeds):
            if record.find(record.read(path), setting, seed, steps):
                continue
            done = train(setting, seed, text, working, steps)
            record.append(path, done)
            typer.echo(f"{setting.name} seed {seed}: {done['held_out']} after {done['seconds']} s")


@app.command()
def report(path: RecordPath = RECORD) -> None:
    """Write convergence.md and convergence.png beside the record."""
    from benchmarks.convergence.report import write

    for written in write(path):
        typer.echo(str(written))


if __name__ == "__main__":
    app()
