"""What the checkpoint tests share: engines by name, full state dicts on disk."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from layouts import LAYOUTS, OPTIONS, SHAPES, Layout, single
from models import Layer, Transformer
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from amsf_dist import AMSF
from amsf_dist.conversion import convert_state_dict


def _on_mesh(use_orig_params: bool) -> Layout:
    """FSDP1 whose sharded state dicts hold DTensors.

    Without a mesh they hold `ShardedTensor`s, and `dcp.load` of torch 2.13 does not find those of
    which a rank has no rows, for any optimizer.
    """

    def wrap(model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model,
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
            auto_wrap_policy=ModuleWrapPolicy({Layer}),
            device_mesh=init_device_mesh("cpu", (dist.get_world_size(),)),
        )

    return Layout(wrap, ())


ENGINES = {
    **LAYOUTS,
    "single": Layout(single, (1,)),
    "fsdp1 on a mesh original": _on_mesh(True),
    "fsdp1 on a mesh flat": _on_mesh(False),
}


def build(
    layout: str, shape: str, *, resumed: bool, tied: bool = True, blocks: str = "adam_mini"
) -> tuple[Layout, nn.Module, AMSF]:
    """A run to be saved, or one with other values that must get all it needs from a checkpoint."""
    model = Transformer(SHAPES[shape], dtype=torch.float32, seed=3 if resumed else 0)
    if not tied:
        model.lm_head.weight = nn.Parameter(0.5 * model.lm_head.weight.detach())
    wrapped = ENGINES[layout].wrap(model)
    lr = 0.5 if resumed else OPTIONS["lr"]
    return ENGINES[layout], wrapped, AMSF(wrapped, blocks=blocks, **{**OPTIONS, "lr": lr})


def save_full(path: str, model: nn.Module, optimizer: AMSF) -> None:
    options = StateDictOptions(full_state_dict=True)
    full = {
        "model": get_model_state_dict(model, options=options),
        "optim": get_optimizer_state_dict(model, optimizer, options=options),
    }
    write(path, full)


def write(path: str, full: dict[str, Any]) -> None:
    """From the first rank."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(full, path)


def load_full(path: str, model: nn.Module, optimizer: AMSF, *, broadcast: bool = False) -> None:
    """Every rank reads the file, or the first one does and tells the others."""
    full: dict[str, Any] = {"model": {}, "optim": {}}
    if not broadcast or dist.get_rank() == 0:
        full = torch.load(path, weights_only=True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    set_model_state_dict(model, full["model"], options=options)
    converted = convert_state_dict(full["optim"], optimizer)
    set_optimizer_state_dict(model, optimizer, converted, options=options)


def go_on(optimizer: AMSF, mode: str) -> None:
    """After loading: the mode is the saved one."""
    assert optimizer.param_groups[0]["train_mode"] == (mode == "train")
    optimizer.train()
