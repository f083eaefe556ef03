"""The tables of the study, in Markdown, made from the record alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.convergence import record
from benchmarks.convergence.setting import STEPS, Setting

__all__ = ["Row", "comparison", "rows", "trials"]


@dataclass(frozen=True)
class Row:
    """A setting and its finished runs, one a seed, in the order of the seeds."""

    setting: Setting
    runs: list[dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        """Held-out loss by seed, nats per byte; runs that diverged are left out."""
        return [run["held_out"] for run in self.runs if run["held_out"] is not None]

    @property
    def mean(self) -> float:
        """Mean over the seeds; infinite if a run diverged."""
        if len(self.losses) < len(self.runs):
            return float("inf")
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None with fewer than two."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None

    @property
    def bytes_per_parameter(self) -> float:
        """Weights and state as measured."""
        run = self.runs[-1]
        return (run["bytes"]["weights"] + run["bytes"]["state"]) / run["parameters"]


def rows(
    records: list[dict[str, Any]], settings: Iterable[Setting], steps: int = STEPS
) -> list[Row]:
    """The settings that have a run, with the runs they have."""
    found = []
    for setting in settings:
        runs = [record.find(records, setting, seed, steps) for seed in setting.seeds]
        if any(runs):
            found.append(Row(setting, [run for run in runs if run]))
    return found


def comparison(found: list[Row], reference: str) -> str:
    """The table of the settings compared, best first.

    Args:
        found: at least the reference.
        reference: name of the setting that differences are taken to, seed by seed.
    """
    base = next(row for row in found if row.setting.name == reference)
    lines = [
        "| setting | bytes/parameter: weights + state | held-out loss, mean | spread | "
        f"by seed | to {reference}, same seeds | training loss | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found, key=lambda row: row.mean):
        cells = [
            f"**{row.setting.name}**" if row is base else row.setting.name,
            _bytes(row),
            f"{row.mean:.4f}",
            "-" if row.spread is None else f"{row.spread:.4f}",
            " ".join(_loss(run) for run in row.runs),
            "" if row is base else _difference(row, base),
            f"{statistics.fmean(run['train'] or float('nan') for run in row.runs):.3f}",
            f"{statistics.fmean(run['seconds'] for run in row.runs):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def trials(found: list[Row]) -> str:
    """The table of what was tried, best first, with all the numbers of the setting."""
    lines = ["| setting | numbers | held-out loss, by seed |", "|---|---|---|"]
    for row in sorted(found, key=lambda row: row.mean):
        losses = " ".join(_loss(run) for run in row.runs)
        lines.append(f"| {row.setting.name} | {numbers(row.setting)} | {losses} |")
    return "\n".join(lines)


def numbers(setting: Setting) -> str:
    """All that decides a run, in one line."""
    options = {**setting.options, "clip": setting.clip, "weights": setting.weights}
    return ", ".join(f"{key} {_word(value)}" for key, value in options.items())


def _word(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _bytes(row: Row) -> str:
    run = row.runs[-1]
    weights, state = (run["bytes"][owner] / run["parameters"] for owner in ("weights", "state"))
    return f"{weights + state:.2f}: {weights:.0f} + {state:.2f}"


def _loss(run: dict[str, Any]) -> str:
    return "diverged" if run["held_out"] is None else f"{run['held_out']:.3f}"


def _difference(row: Row, base: Row) -> str:
    """Mean and range of the relative difference over the seeds that both have."""
    losses = {run["seed"]: run["held_out"] for run in base.runs}
    parts = [
        100.0 * (run["held_out"] / losses[run["seed"]] - 1.0)
        for run in row.runs
        if run["held_out"] is not None and losses.get(run["seed"]) is not None
    ]
    if not parts:
        return "-"
    mean = f"{statistics.fmean(parts):+.1f} %"
    return mean if len(parts) == 1 else f"{mean} ({min(parts):+.1f} .. {max(parts):+.1f})"
