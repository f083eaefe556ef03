"""From a setup to a wrapped model, in the environment that the setup's launcher would make."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from amsf_dist.doctor.setup import EXPORTED, Setup
from amsf_dist.doctor.wrapped import Factory, Wrapped

__all__ = ["environment", "wrap"]


def wrap(setup: Setup, factory: Factory, seed: int, device: torch.device) -> Wrapped:
    """Build a tiny model and wrap it; inside `environment`.

    Args:
        setup: which wrapper.
        factory: of the optimizer.
        seed: of the weights.
        device: of this process.
    """
    if setup.kind == "plain":
        from amsf_dist.doctor.under_torch import UnderTorch

        return UnderTorch(factory, seed, device)
    if setup.kind == "deepspeed":
        from amsf_dist.doctor.under_deepspeed import UnderDeepSpeed

        return UnderDeepSpeed(setup.deepspeed, factory, seed, device)
    from amsf_dist.doctor.under_accelerate import UnderAccelerate

    return UnderAccelerate(setup, factory, seed, device)


@contextmanager
def environment(setup: Setup, device: torch.device) -> Iterator[None]:
    """What the launcher exports, and nothing that was exported for another run; then as before."""
    before = dict(os.environ)
    for key in list(os.environ):
        if key.startswith(EXPORTED):
            del os.environ[key]
    os.environ.update(setup.environment)
    if setup.processes != 1:
        rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(RANK=rank, LOCAL_RANK=rank)
        os.environ.update(WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
        # the process group is there already; they are only looked for
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("MASTER_PORT", "29500")
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        yield
    finally:
        for key in os.environ.keys() - before.keys():
            del os.environ[key]
        os.environ.update(before)
