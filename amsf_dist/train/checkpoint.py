"""Sharded checkpoints: complete or absent, and readable on any number of processes.

`<output_dir>/checkpoints/step_00000100/` holds torch.distributed.checkpoint files (the weights y
and the optimizer's state) and `job.json`. It is written under another name and renamed when every
byte is on disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from amsf_dist.train.config import Config
from amsf_dist.train.errors import UserError, one_line
from amsf_dist.train.parallel import World

__all__ = ["Checkpoint", "check_resumable", "latest", "load", "read", "save"]

FORMAT = 1
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
    """

    path: Path
    step: int
    config: dict[str, Any]
    data_sha256: str


def save(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
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
    weights, state = get_state_dict(model, optimizer)
    with world.together():
        try:
            whole = {"model": weights, "optimizer": state}
            dcp.save(whole, checkpoint_id=temporary)  # type: ignore[attr-defined]
        except _FAILURES as error:
            raise UserError(
                f"{temporary}: the checkpoint could not be written ({_cause(error)}); "
                "the one before it is still good"
            ) from error
        if world.is_main:
            job = {
                "format": FORMAT,
                "step": step,
                "config": config.model_dump(),
                "data_sha256": data_sha256,
            }
            _write_durably(temporary / "job.json", json.dumps(job, indent=1))
            shutil.rmtree(final, ignore_errors=True)  # what is there is not complete
            os.replace(temporary, final)
            _sync(directory)
            for old in _complete(directory)[: -config.keep_checkpoints]:
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def load(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill model and optimizer, whatever the number of processes that wrote it.

    Every process must call it.

    Raises:
        UserError: if its files do not fit or cannot be read.
    """
    weights, state = get_state_dict(model, optimizer)
    whole = {"model": weights, "optimizer": state}
    try:
        dcp.load(whole, checkpoint_id=checkpoint.path)  # type: ignore[attr-defined]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
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
        return Checkpoint(path, job["step"], job["config"], job["data_sha256"])
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
        path for path in found if (path / "job.json").is_file() and (path / ".metadata").is_file()
    ]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step_")))


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


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def _sync(directory: Path) -> None:
    """Make the names in a directory durable; dcp has synced its own files."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
