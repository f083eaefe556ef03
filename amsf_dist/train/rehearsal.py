"""`amsf preflight`: the job's processes meet, exchange a number, and write a checkpoint."""

from __future__ import annotations

import os
import shutil
import socket
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer

from amsf_dist.train.config import Config
from amsf_dist.train.errors import UserError, one_line
from amsf_dist.train.machine import findings, local_size
from amsf_dist.train.parallel import World, join
from amsf_dist.train.preflight import preflight, quiet_libraries

__all__ = ["rehearse", "try_writing"]

NUMBERS = 1 << 20
"""In the all-reduce."""
PROBE = ".preflight"


def rehearse(config: Config) -> int:
    """Go through what a job needs before its first step, on this process and the others.

    Returns:
        The exit code: 0 if nothing is in the way.

    Raises:
        UserError: for the first thing that is.
    """
    quiet_libraries()
    with join(config) as world:
        with world.together():
            preflight(config, world.size)
        if world.is_main:
            typer.echo("config: ok")
        here = local_size(world)
        found = findings(config, here) if os.environ.get("LOCAL_RANK", "0") == "0" else []
        where = f"{socket.gethostname()}: " if here < world.size else ""
        for finding in found:
            mark = "" if finding.level == "ok" else f"{finding.level}: "
            typer.echo(f"{where}{mark}{finding.text}")
        failures = world.sum([float(any(finding.level == "failure" for finding in found))])[0]
        seconds = _all_reduce(world)
        if world.is_main:
            typer.echo(
                f"all-reduce: {world.size} processes, {4 * NUMBERS / 2**20:.0f} MiB "
                f"in {1000 * seconds:.1f} ms"
            )
        try_writing(config, world)
        if world.is_main:
            typer.echo(f"checkpoint: written to {config.output_dir}, read, and removed")
            typer.echo("preflight: passed" if not failures else "preflight: failed, see above")
        return 2 if failures else 0


def try_writing(config: Config, world: World) -> None:
    """Write a small checkpoint where the job will write its own, read it, and remove it.

    Every process must call it. Directories that were not there before are gone afterwards.

    Raises:
        UserError: if it cannot be written, or a process does not see what another one wrote.
    """
    directory = Path(config.output_dir).absolute() / PROBE
    missing = [path for path in directory.parents if not path.exists()]
    try:
        with world.together():
            if world.is_main:
                try:
                    shutil.rmtree(directory, ignore_errors=True)
                    directory.mkdir(parents=True)
                except OSError as error:
                    raise UserError(
                        f"output_dir: {directory.parent}: {error.strerror}; give a directory that "
                        "this user may write to"
                    ) from None
        with world.together():
            _write_and_read(config, directory, world)
    finally:
        if world.is_main:
            shutil.rmtree(directory, ignore_errors=True)
            for path in missing:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()


def _write_and_read(config: Config, directory: Path, world: World) -> None:
    if not directory.is_dir():
        raise UserError(
            f"output_dir: {config.output_dir} on {socket.gethostname()} is not the one of process "
            "0; give a directory that all machines share"
        )
    name = f"rank_{world.rank}"
    written = {name: torch.full((1024,), float(world.rank))}
    read = {name: torch.empty(1024)}
    try:
        with warnings.catch_warnings():
            # "assuming the intent is to save in a single process", which it is
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            alone = world.size == 1
            dcp.save(written, checkpoint_id=directory, no_dist=alone)  # type: ignore[attr-defined]
            dcp.load(read, checkpoint_id=directory, no_dist=alone)  # type: ignore[attr-defined]
    except (OSError, RuntimeError, ValueError, KeyError, dcp.api.CheckpointException) as error:
        raise UserError(
            f"output_dir: a checkpoint cannot be written to {config.output_dir} and read again "
            f"({one_line(error, 200)}); free some space, or give another directory"
        ) from None
    if not torch.equal(written[name], read[name]):
        raise UserError(f"output_dir: {config.output_dir} gave back other numbers than it was told")


def _all_reduce(world: World) -> float:
    """Return the seconds of the second one: the first also opens connections."""
    for _ in range(2):
        start = time.perf_counter()
        numbers = torch.ones(NUMBERS, device=world.device)
        dist.all_reduce(numbers)
        wrong = float((numbers != world.size).sum())  # waits for the GPU
        seconds = time.perf_counter() - start
    if wrong:
        raise UserError("all-reduce: the sum over all processes is wrong; look at the network")
    return seconds
