"""Accelerators for the tests: what `accelerate launch` would make of a file, on CPU processes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from amsf_dist.doctor.setup import Setup, read_setup
from amsf_dist.doctor.under_accelerate import accelerator_for
from amsf_dist.doctor.wrap import environment

CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"
CPU = torch.device("cpu")


def setup_of(name: str, **exported: str) -> Setup:
    """A file of configs/accelerate in fp32, other variables as given."""
    setup = read_setup(CONFIGS / f"{name}.yaml")
    changed = {**setup.environment, "ACCELERATE_MIXED_PRECISION": "no", **exported}
    return dataclasses.replace(setup, environment=changed)


@contextmanager
def accelerated(name: str, **exported: str) -> Iterator[Any]:
    """Inside, an Accelerator, and the environment that it was built in."""
    logging.disable(logging.WARNING)
    setup = setup_of(name, **exported)
    with environment(setup, CPU):
        accelerator = accelerator_for(setup, CPU)
        if setup.speeds:  # there is no data loader that says so
            config = accelerator.state.deepspeed_plugin.deepspeed_config
            config["train_micro_batch_size_per_gpu"] = 1
        yield accelerator
        accelerator.free_memory()
