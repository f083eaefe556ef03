"""The trainer under DeepSpeed's ZeRO-1, 2 and 3."""

from __future__ import annotations

import contextlib
import copy
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
from amsf_dist.train.model import build_model
from amsf_dist.train.optimizers import adamw_for
from amsf_dist.train.parallel import World
from amsf_dist.train.zero_config import deepspeed_config, stage_of
from amsf_dist.train.zero_files import TAG, holds_zero
from amsf_dist.train.zero_memory import held, with_adamw, with_state
from amsf_dist.train.zero_start import quietly, refused

__all__ = ["ZeroTrainer", "build_zero_trainer"]


class ZeroTrainer:
    """A DeepSpeed engine; see `trainer.Trainer`."""

    def __init__(self, engine: Any, config: Config, found: PretrainedConfig, world: World) -> None:
        """Keep the parts; see `build_zero_trainer`."""
        self.model: nn.Module = engine
        self.optimizer: torch.optim.Optimizer = engine.basic_optimizer
        self._engine = engine
        self._config = config
        self._found = found
        self._world = world
        self._writer = _Writer()
        engine.checkpoint_engine = self._writer

    def backward(self, windows: Tensor, last: bool) -> Tensor:
        """Add the gradient of a micro-batch; after the last one DeepSpeed moves the weights."""
        loss = sequence_losses(self.model, windows).mean()
        self._engine.backward(loss)
        self._engine.step()
        return loss.detach() / self._engine.gradient_accumulation_steps()

    def move(self) -> float:
        """Return the norm of the step that `backward` has done."""
        norm = float(self._engine.get_global_grad_norm())
        return norm if self._engine.was_step_applied() else math.inf

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

    def adamw_memory(self) -> dict[str, int]:
        """Return the bytes of AdamW at the same stage."""
        return with_adamw(held(self._engine))

    def close(self) -> None:
        """Take DeepSpeed's hooks and buffers down, before another engine is built."""
        with quietly():
            self._engine.destroy()


class _Writer:
    """DeepSpeed's checkpoint engine, with files that are on the disk when `save` returns.

    A process that cannot write keeps the reason to itself until all have come to the end: raised at
    once, it would leave the others waiting inside DeepSpeed.
    """

    def __init__(self) -> None:
        self.failure: BaseException | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            torch.save(state_dict, path)
            sync(Path(path))
        except (OSError, RuntimeError) as error:
            self.failure = error

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=False)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def create(self, info: Any) -> None:
        """A checkpoint begins."""

    def commit(self, info: Any) -> bool:
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return True


def build_zero_trainer(config: Config, found: PretrainedConfig, world: World) -> ZeroTrainer:
    """Build model and engine; the weights do not depend on the world size or the stage.

    ZeRO-3: modules are partitioned as they are made, then filled from the main process, which alone
    holds the whole model once. Otherwise every process makes the model.

    Args:
        config: the job; `zero_start.start_deepspeed` has been called.
        found: from `model_config`.
        world: this process among the others.

    Raises:
        UserError: if the model, the optimizer or DeepSpeed refuses the config.
    """
    import deepspeed

    settings = deepspeed_config(config, world.size)
    partitioned = stage_of(config, settings) == 3
    with world.together():
        whole = build_model(config, found, "cpu") if world.is_main or not partitioned else None
    buffers = dict(whole.named_buffers()) if whole is not None else {}
    buffers = {name: buffer.clone() for name, buffer in buffers.items()}
    model: nn.Module
    if not partitioned:
        assert whole is not None
        model = whole
    else:
        with world.together(), quietly():
            hollow = deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(settings))
            model = build_model(config, found, "cpu", hollow)
        _fill(model, whole)
        del whole
        buffers = world.broadcast(buffers)  # small: frequencies of rotary embeddings, masks
    with world.together(), quietly(), refused(config):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        adamw = None
        if config.optimizer == "adamw":
            adamw = adamw_for(config.adamw, trained)
        engine, *_ = deepspeed.initialize(
            model=model,
            config=settings,
            model_parameters=[param for _, param in trained],
            optimizer=adamw,
        )
    for name, buffer in model.named_buffers():  # in their own dtype, whatever forward's weights are
        buffer.data = buffers[name].to(buffer.device)
    return ZeroTrainer(engine, config, found, world)


@torch.no_grad()
def _fill(model: nn.Module, whole: nn.Module | None) -> None:
    """Send every parameter from the process that has the whole model, one at a time."""
    import deepspeed

    source = dict(whole.named_parameters()) if whole is not None else {}
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters(param, modifier_rank=0):
            if whole is not None:
                param.copy_(source[name])
