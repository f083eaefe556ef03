"""The trainer under DeepSpeed's ZeRO-1, 2 and 3."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from amsf_dist.integrations.deepspeed import load_state_dict
from amsf_dist.optimizer import AMSF
from amsf_dist.train.alone import read_alone, weights_alone
from amsf_dist.train.config import Config
from amsf_dist.train.durable import sync
from amsf_dist.train.errors import UserError
from amsf_dist.train.evaluation import sequence_losses
from amsf_dist.train.moved import Moved
from amsf_dist.train.optimizers import ADAMW_COMPUTED
from amsf_dist.train.parallel import World
from amsf_dist.train.zero.files import TAG, holds_zero
from amsf_dist.train.zero.memory import held, with_adamw, with_state
from amsf_dist.train.zero.start import quietly
from amsf_dist.train.zero.writer import Writer

__all__ = ["ZeroTrainer"]


class ZeroTrainer:
    """A DeepSpeed engine; see `trainer.Trainer`."""

    def __init__(self, engine: Any, config: Config, found: PretrainedConfig, world: World) -> None:
        """Keep the parts; see `build.build_zero_trainer`."""
        self.model: nn.Module = engine
        self.optimizer: torch.optim.Optimizer = engine.basic_optimizer
        self._engine = engine
        self._config = config
        self._found = found
        self._world = world
        self._writer = engine.checkpoint_engine = Writer()

    def backward(self, windows: Tensor, last: bool) -> Tensor:
        """Add the gradient of a micro-batch; after the last one DeepSpeed moves the weights."""
        loss = sequence_losses(self.model, windows).mean()
        self._engine.backward(loss)
        self._engine.step()
        return loss.detach() / self._engine.gradient_accumulation_steps()

    def move(self) -> Moved:
        """Tell of the step that `backward` has done."""
        norm = float(self._engine.get_global_grad_norm())
        return Moved(norm, self._engine.was_step_applied() and math.isfinite(norm))

    def write(self, directory: Path) -> None:
        """Let DeepSpeed write below the directory, every file durably."""
        self._writer.failure = None
        with quietly():
            self._engine.save_checkpoint(str(directory), tag=TAG)
        if self._writer.failure is not None:
            raise self._writer.failure
        if self._world.is_main:
            for path in (directory / "latest", directory / TAG, directory):
                sync(path)

    def read(self, directory: Path) -> None:
        """Take over a checkpoint of any ZeRO stage, or of torch's trainer."""
        if not holds_zero(directory):
            self._read_torch(directory)
            return
        try:
            with quietly():
                self._engine.load_checkpoint(str(directory), tag=TAG)
        except Exception as error:  # among them one of DeepSpeed's own
            if isinstance(self.optimizer, AMSF):
                raise RuntimeError(f"{type(error).__name__}: {error}") from error
            raise RuntimeError(
                "AdamW goes on only under the ZeRO stage and on the number of processes that saved"
            ) from error

    def _read_torch(self, directory: Path) -> None:
        if not isinstance(self.optimizer, AMSF):
            raise UserError(
                f"{directory}: AdamW's state was not saved under DeepSpeed and cannot go on there; "
                "use the parallel= of then, or give another output_dir"
            )
        whole = read_alone(directory, self._config, self._found)
        load_state_dict(self._engine, whole.model.state_dict(), whole.optimizer.state_dict())

    @contextlib.contextmanager
    def whole_weights(self, newest: Path) -> Iterator[dict[str, Tensor]]:
        """Put the weights together from the newest checkpoint, on the main process alone.

        They are in fp32 there, and gathered they would lie in the memory of every process.
        """
        if not self._world.is_main:
            yield {}
            return
        with weights_alone(newest, self._config, self._found) as weights:
            yield weights

    def memory(self) -> dict[str, int]:
        """Return the bytes that lie in DeepSpeed's partitions, and in the weights of forward."""
        return with_state(held(self._engine), self.optimizer)

    def other_memory(self) -> dict[str, dict[str, int]]:
        """Return the bytes of AdamW at the same stage."""
        return {ADAMW_COMPUTED: with_adamw(held(self._engine))}

    def close(self) -> None:
        """Take DeepSpeed's hooks and buffers down, before another engine is built."""
        with quietly():
            self._engine.destroy()
