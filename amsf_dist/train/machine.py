"""What a job finds on its machine: shared memory, locked memory, GPUs, a free port.

A container or a scheduler sets these limits, and what goes wrong with them shows up later, as a
bus error or a hang that names none of them.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from amsf_dist.train.config import Config
from amsf_dist.train.errors import UserError
from amsf_dist.train.parallel import World
from amsf_dist.train.report import human_bytes

__all__ = [
    "Finding",
    "findings",
    "free_port",
    "gpus",
    "local_size",
    "locked_memory",
    "look_around",
    "shared",
]

logger = logging.getLogger(__name__)

SMALL_SHARED = 1 << 30
"""Docker's default is 64 MiB; NCCL and DeepSpeed's CPU collective exchange through /dev/shm."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        level: `failure`: the job would not run as the config says.
        text: what was found and, unless it is fine, the way out; one line.
    """

    level: Literal["ok", "warning", "failure"]
    text: str


def findings(config: Config, local_size: int) -> list[Finding]:
    """Look at this machine for a number of processes on it."""
    on_gpus = config.device != "cpu" and torch.cuda.is_available()
    volume = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    size = volume.f_blocks * volume.f_frsize if volume else None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    infiniband = Path("/sys/class/infiniband")
    return [
        gpus(config, local_size, torch.cuda.device_count() if torch.cuda.is_available() else 0),
        shared(size, (on_gpus or config.parallel == "deepspeed") and local_size > 1),
        locked_memory(soft, infiniband.is_dir() and any(infiniband.iterdir())),
    ]


def gpus(config: Config, local_size: int, count: int) -> Finding:
    """Hold the processes of this machine against its GPUs."""
    if config.device == "cpu" or not count:
        return Finding("ok", f"processes: {local_size} on CPUs, torch sees {count} GPUs")
    if count < local_size:
        return Finding(
            "failure",
            f"processes: {local_size} here and torch sees {count} GPUs, so the job would run on "
            f"CPUs; set nproc={count} (NPROC_PER_NODE under torchrun), or device=cpu",
        )
    idle = f", {count - local_size} stay idle" if count > local_size else ""
    return Finding("ok", f"processes: {local_size} on {count} GPUs{idle}")


def shared(size: int | None, needed: bool) -> Finding:
    """Look at the size of /dev/shm; None: there is none."""
    if size is None:
        return Finding("warning" if needed else "ok", "shared memory: /dev/shm does not exist")
    if needed and size < SMALL_SHARED:
        return Finding(
            "warning",
            f"shared memory: /dev/shm has {human_bytes(size)}, and the processes exchange through "
            "it; start the container with --shm-size=16g or --ipc=host (Kubernetes: an emptyDir "
            "with medium: Memory)",
        )
    return Finding("ok", f"shared memory: {human_bytes(size)} in /dev/shm")


def locked_memory(limit: int, infiniband: bool) -> Finding:
    """Look at the bytes that a process may lock, which InfiniBand registers its buffers in."""
    if limit == resource.RLIM_INFINITY:
        return Finding("ok", "locked memory: no limit")
    if infiniband:
        return Finding(
            "warning",
            f"locked memory: limited to {human_bytes(limit)}, and InfiniBand locks its buffers; "
            "start the container with --ulimit memlock=-1 (elsewhere: ulimit -l unlimited)",
        )
    return Finding("ok", f"locked memory: {human_bytes(limit)}; no InfiniBand here")


def free_port(port: int) -> Finding:
    """See whether the rendezvous can be opened on a port of this machine."""
    with socket.socket() as probe:
        # As torch's store opens it: what a job before this one left behind does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            cause = "taken by another program" if taken else str(error.strerror)
            return Finding(
                "failure", f"port {port}: {cause}; set MASTER_PORT to a free one, on every node"
            )
    return Finding("ok", f"port {port}: free")


def look_around(config: Config, world: World) -> None:
    """Warn of what may go wrong on this machine; every process must call it.

    Raises:
        UserError: for what will.
    """
    with world.together():
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
        for finding in findings(config, local_size(world)):
            if finding.level == "failure":
                raise UserError(finding.text, everywhere=False)
            if finding.level == "warning":
                logger.warning("warning: %s", finding.text)


def local_size(world: World) -> int:
    """Return the number of processes on this machine: torchrun's name for it, and DeepSpeed's."""
    named = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(named) if named else world.size
