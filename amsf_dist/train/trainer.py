"""What the loop trains: a model and its optimizer, whoever keeps the weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from amsf_dist.train.config import Config
from amsf_dist.train.moved import Moved
from amsf_dist.train.parallel import World
from amsf_dist.train.torch_trainer import build_torch_trainer

__all__ = ["Trainer", "build_trainer", "prepare_trainers"]


class Trainer(Protocol):
    """One model under one optimizer; every process calls every method."""

    model: nn.Module
    """Takes `input_ids`, gives `logits`."""
    optimizer: torch.optim.Optimizer
    """AMSF or AdamW; its groups have the learning rates."""

    def backward(self, windows: Tensor, last: bool) -> Tensor:
        """Add the gradient of a micro-batch.

        Args:
            windows: [batch, sequence_length + 1] token numbers.
            last: of the step.

        Returns:
            Its part of the loss of the step: the parts add up to the mean.
        """

    def move(self) -> Moved:
        """Clip and do the optimizer's step, or skip it if the gradient is not finite."""

    def write(self, directory: Path) -> None:
        """Write weights and state into a directory that exists."""

    def read(self, directory: Path) -> None:
        """Take over what `write` wrote, of either trainer, on any number of processes."""

    def whole_weights(self, newest: Path) -> AbstractContextManager[dict[str, Tensor]]:
        """Hold the weights to evaluate (x for AMSF), whole, on the main process; {} elsewhere.

        Args:
            newest: what `write` wrote last; the weights are still those.
        """

    def memory(self) -> dict[str, int]:
        """Return the bytes on this process by owner, without activations."""

    def other_memory(self) -> dict[str, dict[str, int]]:
        """Return the same of what could be in its place, computed: by the name in the chart."""

    def close(self) -> None:
        """Let go of what the model holds."""


def prepare_trainers(config: Config, world: World) -> None:
    """Do what must be done once, before a trainer is built or anything is written.

    Raises:
        UserError: if DeepSpeed does not work here, or refuses its file.
    """
    if config.parallel == "deepspeed":
        from amsf_dist.train.zero.start import start_deepspeed

        start_deepspeed(config, world)


def build_trainer(config: Config, found: PretrainedConfig, world: World) -> Trainer:
    """Build model and optimizer under `config.parallel`.

    Args:
        config: the job.
        found: from `model_config`.
        world: this process among the others.

    Raises:
        UserError: if the model, the optimizer or DeepSpeed refuses the config.
    """
    if config.parallel == "deepspeed":
        from amsf_dist.train.zero.build import build_zero_trainer

        return build_zero_trainer(config, found, world)
    return build_torch_trainer(config, found, world)
