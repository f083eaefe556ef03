"""Sharded checkpoints: complete or absent, and readable on any number of processes.

`<output_dir>/checkpoints/step_00000100/` holds the weights y and the optimizer's state, in files of
torch.distributed.checkpoint or, in a folder `deepspeed`, of DeepSpeed, and `job.json`. It is
written under another name and renamed when every byte is on disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from pydantic import ValidationError
from torch.distributed.checkpoint.api import CheckpointException

from amsf_dist.train.config import Config
from amsf_dist.train.durable import sync, write_durably
from amsf_dist.train.errors import UserError, one_line
from amsf_dist.train.heartbeat import beat
from amsf_dist.train.parallel import World
from amsf_dist.train.trainer import Trainer

__all__ = ["Checkpoint", "check_resumable", "latest", "load", "read", "save"]

FORMAT = 1
_Read = TypeVar("_Read")

# What a full disk or a damaged file raises; dcp gathers them in a CheckpointException.
_FAILURES = (CheckpointException, OSError, RuntimeError, ValueError, KeyError)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: its directory.
        step: steps done.
        config: of the job that wrote it, as a plain dictionary.
        data_sha256: of the tokens it was trained on.
        files: bytes of each file, by its name below `path`.
    """

    path: Path
    step: int
    config: dict[str, Any]
    data_sha256: str
    files: dict[str, int] = field(default_factory=dict)


def save(
    directory: Path,
    step: int,
    trainer: Trainer,
    config: Config,
    data_sha256: str,
    world: World,
) -> Path:
    """Write the checkpoint of a step and remove the oldest; every process must call it.

    Returns:
        The directory of the checkpoint.

    Raises:
        UserError: if it cannot be written; those before it stay as they were.
    """
    final = directory / f"step_{step:08d}"
    temporary = final.with_suffix(".tmp")
    if world.broadcast(final in _complete(directory)):
        return final
    with world.together():
        if world.is_main:
            try:
                for abandoned in directory.glob("step_*.tmp"):
                    shutil.rmtree(abandoned, ignore_errors=True)
                temporary.mkdir(parents=True)
            except OSError as error:
                raise UserError(
                    f"{temporary}: {error.strerror}; free some space or change output_dir"
                ) from None
    beat()
    with world.together():
        try:
            trainer.write(temporary)
        except _FAILURES as error:
            raise UserError(
                f"{temporary}: the checkpoint could not be written ({_cause(error)}); "
                "the one before it is still good"
            ) from error
    beat()
    with world.together():  # everyone has written
        if world.is_main:
            job = {
                "format": FORMAT,
                "step": step,
                "config": config.model_dump(),
                "data_sha256": data_sha256,
                "files": _sizes(temporary),
            }
            write_durably(temporary / "job.json", json.dumps(job, indent=1))
            shutil.rmtree(final, ignore_errors=True)  # what is there is not complete
            os.replace(temporary, final)
            sync(directory)
            for old in _complete(directory)[: -config.keep_checkpoints]:
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def load(checkpoint: Checkpoint, read: Callable[[Path], _Read]) -> _Read:
    """Read a checkpoint, whatever the number of processes that wrote it.

    Every process must call it.

    Args:
        checkpoint: from `latest` or `read`.
        read: a trainer's, or what else reads its files; gets its directory.

    Returns:
        What `read` does.

    Raises:
        UserError: if its files do not fit or cannot be read.
    """
    sizes = _sizes(checkpoint.path)  # before it is read: a process that fails alone hangs the rest
    for name, size in checkpoint.files.items():
        if sizes.get(name) != size:
            raise UserError(
                f"{checkpoint.path / name}: {sizes.get(name, 'no')} bytes of {size}; delete "
                "the checkpoint to continue from the one before, or give another output_dir"
            )
    try:
        return read(checkpoint.path)
    except _FAILURES as error:
        raise UserError(
            f"{checkpoint.path}: cannot be loaded ({_cause(error)}); "
            "delete it to continue from the one before, or give another output_dir"
        ) from error


def latest(directory: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint in a directory, found by looking."""
    complete = _complete(directory)
    return read(complete[-1]) if complete else None


def read(path: Path) -> Checkpoint:
    """Return what a checkpoint directory says about itself.

    Raises:
        UserError: if it is not a complete checkpoint of this format.
    """
    try:
        job = json.loads((path / "job.json").read_text())
        if job["format"] != FORMAT:
            raise UserError(
                f"{path}: written in format {job['format']}, this version reads {FORMAT}; "
                "use the amsf_dist that wrote it"
            )
        files = job.get("files", {})
        return Checkpoint(path, job["step"], job["config"], job["data_sha256"], files)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: not a complete checkpoint ({one_line(error, 200)}); "
            "give a directory such as <output_dir>/checkpoints/step_00000100"
        ) from None


def check_resumable(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse to continue a checkpoint as another job.

    Args:
        checkpoint: to continue from.
        config: the job that wants to.

    Raises:
        UserError: naming the first key that differs, both values, and the cure.
    """
    cure = "change it back, or give another output_dir"
    try:
        saved = _flat(Config.model_validate(checkpoint.config).identity())
    except ValidationError:
        raise UserError(
            f"{checkpoint.path}: written by a version with other config keys; use that version, "
            "or give another output_dir"
        ) from None
    wanted = _flat(config.identity())
    for key in sorted(saved.keys() | wanted.keys()):
        if saved.get(key) != wanted.get(key):
            raise UserError(
                f"{key} is {json.dumps(wanted.get(key))}, and {checkpoint.path} was trained with "
                f"{json.dumps(saved.get(key))}; {cure}"
            )
    if checkpoint.step > config.steps:
        raise UserError(
            f"steps is {config.steps}, and {checkpoint.path} has done {checkpoint.step} already; "
            "raise steps, or give another output_dir"
        )


def _complete(directory: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    found = [path for path in directory.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    complete = [
        path
        for path in found
        if (path / "job.json").is_file()
        and ((path / ".metadata").is_file() or (path / "latest").is_file())  # torch's, DeepSpeed's
    ]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step_")))


def _sizes(directory: Path) -> dict[str, int]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return one_line(error, 200)


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
