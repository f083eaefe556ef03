"""DeepSpeed engines for the tests: how they are built, trained and read out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from layouts import OPTIONS, loss_of, tagged
from torch import Tensor, nn

from amsf_dist.blocks import canonical_name

CLIP = 0.5
HEADS = 8


def config(**changes: Any) -> dict[str, Any]:
    """A complete DeepSpeed configuration; `stage`, `zero` and `amsf` are short for its sections."""
    zero = {"stage": changes.pop("stage", 0), **changes.pop("zero", {})}
    params = {**OPTIONS, "head_dim": HEADS, **changes.pop("amsf", {})}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": zero,
        "optimizer": {"type": "AMSF", "params": params},
        **changes,
    }


class DeepSpeedCPUAdam(torch.optim.Adam):
    """Stands for the optimizer that accelerate puts in the place of all others."""

    def __init__(self, params: Any, adamw_mode: bool = True, **kwargs: Any) -> None:
        super().__init__(params, lr=1e-3)


def put_cpu_adam() -> None:
    """Spare this process the real one, which is compiled for a minute."""
    import deepspeed

    deepspeed.ops.adam.DeepSpeedCPUAdam = DeepSpeedCPUAdam


def engine_of(model: nn.Module, settings: Mapping[str, Any], **kwargs: Any) -> Any:
    """An engine as a user builds one; the optimizer by its name in the JSON unless one is given."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    logging.disable(logging.INFO)
    import deepspeed

    settings = dict(settings)
    if "optimizer" in kwargs:
        settings.pop("optimizer")
    kwargs.setdefault("model_parameters", [p for p in model.parameters() if p.requires_grad])
    return deepspeed.initialize(model=model, config=settings, **kwargs)[0]


def train(engine: Any, vocab: int, steps: Iterable[int]) -> None:
    """Train on this rank's part of every batch, in micro-batches if the engine accumulates."""
    pieces, rank, world_size = engine.gradient_accumulation_steps(), dist.get_rank(), _world()
    for step in steps:
        for piece in range(pieces):
            part = rank * pieces + piece
            engine.backward(loss_of(engine, vocab, step, part, world_size * pieces))
            engine.step()


def weights(engine: Any) -> dict[str, Tensor]:
    """Canonical name -> the whole parameter that forward uses."""
    import deepspeed

    params = list(engine.module.parameters())
    partitioned = any(hasattr(param, "ds_id") for param in params)
    with deepspeed.zero.GatheredParameters(params) if partitioned else nullcontext():
        return {
            canonical_name(name): param.detach().clone()
            for name, param in engine.module.named_parameters()
        }


def moments(engine: Any) -> dict[str, Tensor]:
    """Canonical name (and key) -> second moments of all blocks, in the order of the line."""
    optimizer = engine.basic_optimizer
    records = optimizer.state_dict()["amsf_pieces"]
    with optimizer._owner.shown():
        params = [param for group in optimizer.param_groups for param in group["params"]]
    mine = []
    for param, pieces in zip(params, records, strict=True):
        for piece in pieces:
            for key, at in piece["moments"].items():
                vector = optimizer.state[param][key].view(-1).clone()
                here = vector[at["first_moment"] :][: at["num_moments"]]
                name = tagged(piece["name"], key)
                mine.append((name, piece["shape"], at["block_numel"], at["first_block"], here))
    gathered: list[Any] = [None] * _world()
    dist.all_gather_object(gathered, mine)
    found: dict[str, Tensor] = {}
    for name, shape, size, first, values in (entry for rank in gathered for entry in rank):
        count = torch.Size(shape).numel() // size
        line = found.setdefault(name, values.new_full((count,), torch.nan))
        held = line[first : first + len(values)]
        assert torch.equal(torch.where(held.isnan(), values, held), values), f"{name} differs"
        line[first : first + len(values)] = values
    return found


def counters(engine: Any) -> set[float]:
    """Steps that the tensors of this rank say they have done."""
    optimizer = engine.basic_optimizer
    return {float(state["step"]) for state in optimizer.state.values()}


def everything(engine: Any) -> dict[str, dict[str, Tensor]]:
    """y, x and v by name; the engine goes on at y."""
    found = {"y": weights(engine), "v": moments(engine)}
    with engine.optimizer.averaged_parameters():
        found["x"] = weights(engine)
    return found


def _world() -> int:
    return dist.get_world_size()
