"""TensorBoard and Weights & Biases, for those who ask; imported only then."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Protocol

from amsf_dist.train.config import Config
from amsf_dist.train.errors import UserError

__all__ = ["Tracker", "check_trackers", "open_trackers"]


class Tracker(Protocol):
    """Takes the numbers of a step."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record the numbers under names such as `train/loss`."""

    def close(self) -> None:
        """Write what is still held back."""


class _TensorBoard:
    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, directory: Path, config: Config) -> None:
        import wandb  # type: ignore[import-not-found]

        # The same id for the same folder, so that a resumed run draws on.
        self._run = wandb.init(
            dir=str(directory),
            id=directory.as_posix().replace("/", "-").strip("-."),
            resume="allow",
            config=config.model_dump(),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def check_trackers(config: Config) -> None:
    """Raise a UserError if a package that the config asks for is not installed."""
    for name in ("tensorboard", "wandb"):
        if getattr(config.log, name) and importlib.util.find_spec(name) is None:
            raise UserError(
                f"log.{name}: the package {name} is not installed; "
                f"pip install {name}, or set log.{name}=false"
            )


def open_trackers(config: Config, directory: Path) -> list[Tracker]:
    """Return the trackers that the config asks for, besides metrics.jsonl."""
    trackers: list[Any] = []
    if config.log.tensorboard:
        trackers.append(_TensorBoard(directory))
    if config.log.wandb:
        trackers.append(_Wandb(directory, config))
    return trackers
