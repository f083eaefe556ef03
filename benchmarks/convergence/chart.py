"""The picture of the study: curves, and loss against bytes."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.convergence.table import Row

__all__ = ["draw"]

_COLORS = ["#264653", "#d1603d", "#1f6f8b", "#5b8c5a", "#e9a03b", "#9c2c2c", "#8ab6c1", "#7a5c99"]
_FROM_STEP = 300  # before that all curves are steep and lie on one another


def draw(curves: list[Row], final: list[Row], path: Path) -> Path:
    """Draw and save.

    Args:
        curves: settings whose curves are shown: mean over the seeds, and a band from the lowest
            to the highest.
        final: settings whose last loss is shown against their bytes, a dot a seed.
        path: the file; replaced.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for row, color in zip(curves, _COLORS, strict=False):
        _curve(left, row, color)
    left.set(title="Held-out loss while training", xlabel="step", ylabel="nats per byte")
    left.legend(frameon=False, fontsize=8)
    _dots(right, sorted(final, key=lambda row: row.bytes_per_parameter))
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return path


def _curve(axis: Any, row: Row, color: str) -> None:
    steps = [step for step, _ in row.runs[0]["curve"] if step >= _FROM_STEP]
    by_step = [
        [loss for run in row.runs for at, loss in run["curve"] if at == step and loss is not None]
        for step in steps
    ]
    if not all(by_step):
        return
    axis.plot(steps, [statistics.fmean(v) for v in by_step], color=color, label=row.setting.name)
    axis.fill_between(
        steps, list(map(min, by_step)), list(map(max, by_step)), color=color, alpha=0.12, lw=0
    )


def _dots(axis: Any, final: list[Row]) -> None:
    """One line a setting, the fewest bytes at the bottom; a scatter would hide equal bytes."""
    for place, row in enumerate(final):
        color = "#d1603d" if row.setting.optimizer == "amsf" else "#264653"
        axis.plot(row.losses, [place] * len(row.losses), "o", color=color, alpha=0.6, markersize=5)
        if row.losses:
            axis.plot([statistics.fmean(row.losses)], [place], "|", color=color, markersize=16)
    labels = [f"{row.setting.name}  ({row.bytes_per_parameter:.2f} B)" for row in final]
    axis.set_yticks(range(len(final)), labels, fontsize=8)
    axis.set(
        title=f"After {final[0].runs[0]['steps']:,} steps: a dot a seed, a bar their mean",
        xlabel="held-out loss, nats per byte",
    )
