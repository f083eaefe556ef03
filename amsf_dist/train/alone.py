"""A checkpoint read by one process alone, whatever number of processes wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from amsf_dist.train.config import Config
from amsf_dist.train.model import build_model
from amsf_dist.train.optimizers import build_optimizer
from amsf_dist.train.parallel import World
from amsf_dist.train.torch_trainer import TorchTrainer
from amsf_dist.train.zero.files import adamw_weights, holds_zero

__all__ = ["read_alone", "weights_alone"]


def read_alone(directory: Path, config: Config, found: PretrainedConfig) -> TorchTrainer:
    """Build the whole model in this process's memory, and read a checkpoint into it.

    Args:
        directory: what a trainer wrote.
        config: of the job that wrote it.
        found: from `model_config`.
    """
    config = config.model_copy(update={"parallel": "single", "device": "cpu", "release": False})
    model = build_model(config, found, "cpu")
    world = World(rank=0, size=1, device=torch.device("cpu"))
    trainer = TorchTrainer(model, build_optimizer(config, model), config, world)
    trainer.read(directory)
    return trainer


@contextmanager
def weights_alone(
    directory: Path, config: Config, found: PretrainedConfig
) -> Iterator[dict[str, Tensor]]:
    """Hold the weights to evaluate (x for AMSF) of a checkpoint; the arguments of `read_alone`."""
    if config.optimizer == "adamw" and holds_zero(directory):
        yield adamw_weights(directory)
        return
    with read_alone(directory, config, found).whole_weights(directory) as weights:
        yield weights
