"""TensorBoard, Weights & Biases and Prometheus, for those who ask; imported only then."""

from __future__ import annotations

import importlib.util
import re
import uuid
from functools import partial
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
    def __init__(self, directory: Path, config: Config, done_steps: int) -> None:
        import wandb  # type: ignore[import-not-found]

        # The id lies in the run's folder: a resumed run draws on, one that begins anew, or that has
        # the same name on another machine, is a run of its own.
        kept = directory / "wandb_id.txt"
        if not done_steps or not kept.exists():
            kept.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            dir=str(directory),
            id=kept.read_text(),
            name=directory.as_posix(),
            resume="allow",
            config=config.model_dump(),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _Prometheus:
    """The newest numbers as gauges: `amsf_train_loss`, and `amsf_step`."""

    def __init__(self, host: str, port: int) -> None:
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        registry = CollectorRegistry()
        self._new_gauge = partial(Gauge, namespace="amsf", registry=registry)
        self._gauges = {"step": self._new_gauge("step", "Steps done")}
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise UserError(
                f"log.prometheus_port={port} on {host}: {error.strerror}; choose another one"
            ) from None

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in {"step": float(step), **values}.items():
            known = re.sub(r"[^a-zA-Z0-9_]", "_", name)
            if known not in self._gauges:
                self._gauges[known] = self._new_gauge(known, f"{name} of the newest step told of")
            self._gauges[known].set(value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def check_trackers(config: Config) -> None:
    """Raise a UserError if a package that the config asks for is not installed."""
    log = config.log
    asked = {
        "tensorboard": ("tensorboard", "tensorboard=false") if log.tensorboard else None,
        "wandb": ("wandb", "wandb=false") if log.wandb else None,
        "prometheus_client": ("prometheus_port", "prometheus_port=null")
        if log.prometheus_port is not None
        else None,
    }
    for package, keys in asked.items():
        if keys is not None and importlib.util.find_spec(package) is None:
            raise UserError(
                f"log.{keys[0]}: the package {package} is not installed; "
                f"pip install {package}, or set log.{keys[1]}"
            )


def open_trackers(config: Config, directory: Path, done_steps: int = 0) -> list[Tracker]:
    """Return the trackers that the config asks for, besides metrics.jsonl.

    Args:
        config: of the run.
        directory: of the run; it exists.
        done_steps: steps that a checkpoint holds already.
    """
    trackers: list[Any] = []
    if config.log.tensorboard:
        trackers.append(_TensorBoard(directory))
    if config.log.wandb:
        trackers.append(_Wandb(directory, config, done_steps))
    if config.log.prometheus_port is not None:
        trackers.append(_Prometheus(config.log.prometheus_host, config.log.prometheus_port))
    return trackers
