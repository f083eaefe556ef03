"""loss.png and memory.png, drawn from metrics.jsonl alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from amsf_dist.train.errors import UserError
from amsf_dist.train.metrics import read_metrics
from amsf_dist.train.optimizers import ADAMW_COMPUTED, LABELS

__all__ = ["draw"]

_LINES = ["#1f6f8b", "#d1603d", "#5b8c5a"]
_OWNERS = {
    "weights": "#264653",
    "masters": "#325866",
    "error_bits": "#3d6b7d",
    "gradients": "#8ab6c1",
    "gap": "#e9a03b",
    "exp_avg": "#e07a3f",
    "v": "#9c2c2c",
    "exp_avg_sq": "#c8553d",
}


def draw(directory: Path) -> list[Path]:
    """Draw the charts of a run and of the runs it is compared with.

    Args:
        directory: `output_dir` of a run.

    Returns:
        The files written.

    Raises:
        UserError: if the directory holds no run.
    """
    runs = {name: read_metrics(path / "metrics.jsonl") for name, path in _runs(directory).items()}
    if not any(line["kind"] == "train" for lines in runs.values() for line in lines):
        raise UserError(
            f"{directory}/metrics.jsonl holds no step yet; train longer, or set log.every=1"
        )
    written = [_save(_loss_chart(runs), directory / "loss.png")]
    if owners := _owners(runs):
        written.append(_save(_memory_chart(owners), directory / "memory.png"))
    return written


def _runs(directory: Path) -> dict[str, Path]:
    """Return label -> folder, the main run first."""
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text())
    except OSError as error:
        raise UserError(
            f"{directory}/config.yaml: {error.strerror}; "
            "give the output_dir of a run that `amsf train` has begun"
        ) from None
    found = {LABELS[config["optimizer"]]: directory}
    for name in config["compare"]:
        if (directory / name / "metrics.jsonl").is_file():
            found[LABELS[name]] = directory / name
    return found


def _owners(runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, int]]:
    """Return bytes by owner of every run that has come to its end, and of AdamW in any case."""
    last = {
        label: line for label, lines in runs.items() for line in lines if line["kind"] == "memory"
    }
    owners = {label: line["owners"] for label, line in last.items()}
    for line in last.values():
        owners |= line["others"]
    if LABELS["adamw"] in owners:
        owners.pop(ADAMW_COMPUTED, None)
    return owners


def _loss_chart(runs: Mapping[str, list[dict[str, Any]]]) -> Any:
    figure, (left, right) = _figure(2)
    for (label, lines), color in zip(runs.items(), _LINES, strict=False):
        for axis, kind, key in ((left, "train", "loss"), (right, "validation", "bits_per_byte")):
            points = [line for line in lines if line["kind"] == kind and line[key] is not None]
            axis.plot(
                [line["step"] for line in points],
                [line[key] for line in points],
                color=color,
                label=label,
                linewidth=1.6,
                marker="o" if kind == "validation" else None,
                markersize=4,
            )
    left.set(title="Training loss", xlabel="step", ylabel="nats per token")
    right.set(title="Held-out text", xlabel="step", ylabel="bits per byte")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    return figure


def _memory_chart(runs: Mapping[str, Mapping[str, int]]) -> Any:
    figure, (axis,) = _figure(1)
    scale, unit = _unit(max(sum(owners.values()) for owners in runs.values()))
    bottom = [0.0] * len(runs)
    seen = dict.fromkeys(owner for owners in runs.values() for owner in owners)
    for owner in [
        *(name for name in _OWNERS if name in seen),
        *(name for name in seen if name not in _OWNERS),
    ]:
        sizes = [owners.get(owner, 0) / scale for owners in runs.values()]
        axis.bar(list(runs), sizes, bottom=bottom, width=0.5, label=owner, color=_OWNERS.get(owner))
        bottom = [below + size for below, size in zip(bottom, sizes, strict=True)]
    for place, total in enumerate(bottom):
        axis.text(place, total, f"{total:.1f} {unit}", ha="center", va="bottom")
    axis.set(title="Memory of process 0, without activations", ylabel=unit)
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(
        handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    return figure


def _unit(largest: float) -> tuple[float, str]:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= scale:
            return scale, unit
    return 1.0, "B"


def _figure(columns: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: no global state, and no display is looked for.
    figure = Figure(figsize=(4.0 + 3.0 * columns, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Any, path: Path) -> Path:
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    os.replace(temporary, path)
    return path
