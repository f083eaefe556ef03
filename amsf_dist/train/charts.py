"""loss.png and memory.png, and runs side by side, drawn from metrics.jsonl alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml

from amsf_dist.train.errors import UserError
from amsf_dist.train.metrics import read_metrics
from amsf_dist.train.optimizers import ADAMW_COMPUTED, LABELS

__all__ = ["draw", "draw_together"]

_LINES = ["#1f6f8b", "#d1603d", "#5b8c5a", "#7a4f8f", "#b8860b", "#4d4d4d"]
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


def draw_together(directories: Sequence[Path], out: Path) -> Path:
    """Draw the losses and the memory of several runs in one picture.

    Args:
        directories: `output_dir` of each; their names are the labels.
        out: the picture.

    Raises:
        UserError: if one of them holds no run, or two would have the same label.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for directory in directories:
        config = _config(directory)
        label = f"{directory.resolve().name} ({LABELS[config['optimizer']]})"
        if label in found:
            raise UserError(f"{directory}: another run has the same name; rename one of the two")
        found[label] = read_metrics(directory / "metrics.jsonl")
        if not any(line["kind"] == "train" for line in found[label]):
            raise UserError(f"{directory}/metrics.jsonl holds no step yet; leave it out")
    figure, (left, middle, right) = _figure(3)
    _draw_losses(left, middle, found)
    last = {
        label: line for label, lines in found.items() for line in lines if line["kind"] == "memory"
    }
    if last:
        _draw_memory(right, {label: line["owners"] for label, line in last.items()}, turned=True)
    else:
        right.set_axis_off()
    return _save(figure, out)


def _runs(directory: Path) -> dict[str, Path]:
    """Return label -> folder, the main run first."""
    config = _config(directory)
    found = {LABELS[config["optimizer"]]: directory}
    for name in config["compare"]:
        if (directory / name / "metrics.jsonl").is_file():
            found[LABELS[name]] = directory / name
    return found


def _config(directory: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = yaml.safe_load((directory / "config.yaml").read_text())
    except OSError as error:
        raise UserError(
            f"{directory}/config.yaml: {error.strerror}; "
            "give the output_dir of a run that `amsf train` has begun"
        ) from None
    return config


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
    _draw_losses(left, right, runs)
    return figure


def _draw_losses(left: Any, right: Any, runs: Mapping[str, list[dict[str, Any]]]) -> None:
    for (label, lines), color in zip(runs.items(), cycle(_LINES), strict=False):
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


def _memory_chart(runs: Mapping[str, Mapping[str, int]]) -> Any:
    figure, (axis,) = _figure(1)
    _draw_memory(axis, runs)
    return figure


def _draw_memory(axis: Any, runs: Mapping[str, Mapping[str, int]], turned: bool = False) -> None:
    """Stacked bars; turned: long labels under many of them do not touch."""
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
    if turned:
        axis.tick_params(axis="x", rotation=25)
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(
        handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )


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
