"""The trainer that is torch's own: FSDP2, DDP or one process."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from transformers import PretrainedConfig

from amsf_dist.optimizer import AMSF
from amsf_dist.release import GradientRelease, enable_gradient_release
from amsf_dist.train.config import Config
from amsf_dist.train.evaluation import sequence_losses
from amsf_dist.train.moved import Moved
from amsf_dist.train.optimizers import (
    ADAMW_COMPUTED,
    ORDINARY,
    adamw_fp32,
    build_optimizer,
    evaluation_weights,
    local_elements,
    memory_by_owner,
)
from amsf_dist.train.parallel import World, arithmetic, build_parallel_model, gradient_sync
from amsf_dist.train.zero.files import holds_zero, read_whole

__all__ = ["TorchTrainer", "build_torch_trainer"]


class TorchTrainer:
    """A model that torch has sharded or copied; see `trainer.Trainer`."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, world: World
    ) -> None:
        """Keep the parts; see `build_torch_trainer`."""
        self.model = model
        self.optimizer = optimizer
        self._config = config
        self._world = world
        self._skipped = 0
        self._release: GradientRelease | None = None
        if config.release and isinstance(optimizer, AMSF):
            mode = config.accumulation.mode
            self._release = enable_gradient_release(model, optimizer, accumulation=mode)

    def backward(self, windows: Tensor, last: bool) -> Tensor:
        """Add the gradient of a micro-batch; it is reduced as the config says."""
        micro_batches = self._micro_batches
        if isinstance(self.optimizer, AMSF) and self._release is not None:
            self.optimizer.optimizer_accumulation = not last
        with gradient_sync(self.model, last, self._config):
            with arithmetic(self._config, self._world):
                part = sequence_losses(self.model, windows).mean() / micro_batches
            part.backward()
        return part.detach()

    def move(self) -> Moved:
        """Clip, step unless the gradient is not finite, and let go of it."""
        optimizer, config = self.optimizer, self._config
        if isinstance(optimizer, AMSF) and (self._release or _clips_by_norm(optimizer)):
            optimizer.step()
            optimizer.zero_grad()
            skipped, norm = optimizer.skipped_steps, optimizer.grad_norm
            applied, self._skipped = skipped == self._skipped, skipped
            return Moved(math.nan if norm is None else norm, applied)
        by_norm = config.clip == "norm" or not isinstance(optimizer, AMSF)
        norm = _clip(self.model, config.max_grad_norm if by_norm else None)
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        return Moved(norm, math.isfinite(norm))

    def write(self, directory: Path) -> None:
        """Write torch.distributed.checkpoint files, a part from each process."""
        weights, state = get_state_dict(self.model, self.optimizer)
        whole = {"model": weights, "optimizer": state}
        dcp.save(whole, checkpoint_id=directory)  # type: ignore[attr-defined]

    def read(self, directory: Path) -> None:
        """Fill model and optimizer, from DeepSpeed's files too."""
        if holds_zero(directory):
            whole_weights, whole_state = read_whole(directory, self._config)
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=dict(whole_weights),
                optim_state_dict=whole_state,
                # not strict: tied weights are there once
                options=StateDictOptions(full_state_dict=True, strict=False),
            )
            return
        weights, state = get_state_dict(self.model, self.optimizer)
        whole = {"model": weights, "optimizer": state}
        with warnings.catch_warnings():
            # "assuming the intent is to load in a single process", which it is
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            alone = self._world.size == 1
            dcp.load(whole, checkpoint_id=directory, no_dist=alone)  # type: ignore[attr-defined]
        set_state_dict(self.model, self.optimizer, model_state_dict=weights, optim_state_dict=state)

    @contextmanager
    def whole_weights(self, newest: Path) -> Iterator[dict[str, Tensor]]:
        """Gather the evaluation weights on the main process; the files are not needed."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        with evaluation_weights(self.optimizer):  # on one process they may be the live ones
            weights: dict[str, Any] = dict(get_model_state_dict(self.model, options=options))
            yield weights

    def memory(self) -> dict[str, int]:
        """Return the bytes of this process's shards."""
        kept = self._micro_batches > 1 and self._config.accumulation.mode == "exact"
        at_once = None if self._release is None or kept else self._release.largest
        return memory_by_owner(self.optimizer, at_once)

    def other_memory(self) -> dict[str, dict[str, int]]:
        """Return the bytes of the same shards in the ordinary step, and under AdamW."""
        ordinary = {ORDINARY: memory_by_owner(self.optimizer)} if self._release else {}
        return {**ordinary, ADAMW_COMPUTED: adamw_fp32(local_elements(self.optimizer))}

    def close(self) -> None:
        """Let gradients be; nothing else is held that Python does not let go of."""
        if self._release is not None:
            self._release.remove()

    @property
    def _micro_batches(self) -> int:
        return self._config.micro_batches(self._world.size)


def build_torch_trainer(config: Config, found: PretrainedConfig, world: World) -> TorchTrainer:
    """Build a model under `fsdp2`, `ddp` or `single`, and its optimizer.

    Raises:
        UserError: if one of them refuses the config.
    """
    model = build_parallel_model(config, found, world)
    with world.together():
        optimizer = build_optimizer(config, model)
    return TorchTrainer(model, optimizer, config, world)


def _clips_by_norm(optimizer: AMSF) -> bool:
    return any(group["clip"] == "norm" for group in optimizer.param_groups)


def _clip(model: nn.Module, max_norm: float | None) -> float:
    """Clip, and return the norm before it: of the whole gradient, so the same on every process."""
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    factor = 1.0 if max_norm is None else max_norm / (float(norm) + 1e-6)
    if factor < 1.0 and math.isfinite(factor):
        torch._foreach_mul_([_local(grad) for grad in grads], factor)
    return float(norm)


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
