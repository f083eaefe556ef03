"""Model and engine under DeepSpeed."""

from __future__ import annotations

import copy
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from amsf_dist.train.config import Config
from amsf_dist.train.model import build_model
from amsf_dist.train.optimizers import adamw_for
from amsf_dist.train.parallel import World
from amsf_dist.train.zero.config import deepspeed_config, stage_of
from amsf_dist.train.zero.start import quietly, refused
from amsf_dist.train.zero.trainer import ZeroTrainer

__all__ = ["build_zero_trainer"]


def build_zero_trainer(config: Config, found: PretrainedConfig, world: World) -> ZeroTrainer:
    """Build model and engine; the weights do not depend on the number of processes or the stage.

    Args:
        config: the job; `start.start_deepspeed` has been called.
        found: from `model_config`.
        world: this process among the others.

    Raises:
        UserError: if the model, the optimizer or DeepSpeed refuses the config.
    """
    settings = deepspeed_config(config, world.size)
    if stage_of(config, settings) == 3:
        model, buffers = _partitioned(config, found, world, settings)
    else:
        with world.together():
            model = build_model(config, found, "cpu")
        buffers = _buffers(model)
    with world.together(), quietly(), refused(config):
        trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=model,
            config=settings,
            model_parameters=[param for _, param in trained],
            # None: AMSF, by its name in the settings
            optimizer=adamw_for(config.adamw, trained) if config.optimizer == "adamw" else None,
        )
    for name, buffer in model.named_buffers():  # in their own dtype, whatever forward's weights are
        buffer.data = buffers[name].to(buffer.device)
    return ZeroTrainer(engine, config, found, world)


def _partitioned(
    config: Config, found: PretrainedConfig, world: World, settings: dict[str, Any]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Partition modules as they are made, then fill them; only the main process has them all."""
    with world.together():
        whole = build_model(config, found, "cpu") if world.is_main else None
    with world.together(), quietly():
        hollow = deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(settings))
        model = build_model(config, found, "cpu", hollow)
    _fill(model, whole)
    # small: frequencies of rotary embeddings, masks
    return model, world.broadcast(_buffers(whole) if whole is not None else {})


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@torch.no_grad()
def _fill(model: nn.Module, whole: nn.Module | None) -> None:
    """Send every parameter from the process that has the whole model, one at a time."""
    source = dict(whole.named_parameters()) if whole is not None else {}
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters(param, modifier_rank=0):
            if whole is not None:
                param.copy_(source[name])
