"""The shardings that the parity tests run through, and how a run under one of them is read out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import Shape, Transformer, batch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from amsf_dist.blocks import canonical_name

GLOBAL_BATCH = 12  # rows; every rank takes its part, so 1, 2, 3, 4 ranks see the same batch

SHAPES = {
    # q heads of 8 rows: aligned at 2 and 4 ranks, k heads cut at 4, both cut and uneven at 3
    "even": Shape(vocab=24, dim=32, heads=4, kv_heads=2, head_dim=8, hidden=40),
    # 6 query rows and 2 key rows: ranks without a part at 3 and 4 ranks; everything else uneven
    "uneven": Shape(vocab=23, dim=10, heads=3, kv_heads=1, head_dim=2, hidden=13),
}


def loss_of(model: nn.Module, vocab: int, step: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """Mean loss of one rank's part of the global batch."""
    tokens = batch(step, vocab, size=GLOBAL_BATCH).chunk(world_size)[rank]
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def single(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: Transformer, **options: Any) -> nn.Module:
    """A unit per layer; embedding and head are tied and stay in the root's unit."""
    options.setdefault("mesh", init_device_mesh("cpu", (dist.get_world_size(),)))
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


LAYOUTS: dict[str, Callable[[Any], nn.Module]] = {"single": single, "ddp": ddp, "fsdp2": fsdp2}


def train(
    model: nn.Module, optimizer: Any, vocab: int, steps: range, *, clip: float | None = None
) -> None:
    """Plain training on this rank's part of every batch."""
    distributed = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, vocab, step, rank, world_size).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Canonical name -> whole parameter."""
    return {canonical_name(name): whole(param) for name, param in model.named_parameters()}


def moments(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Canonical name -> second moments of all blocks."""
    return {
        canonical_name(name): whole(optimizer.state[param]["exp_avg_sq"])
        for name, param in model.named_parameters()
    }


def relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor], leave_out: str = "") -> Any:
    """(largest error over names, its name): norm of the difference over norm, per tensor."""
    assert ours.keys() == theirs.keys()
    errors = []
    for name, value in ours.items():
        if leave_out and name.endswith(leave_out):
            continue
        a, b = value.double(), theirs[name].double()
        norm = float(torch.linalg.vector_norm(b))
        errors.append((float(torch.linalg.vector_norm(a - b)) / (norm or 1.0), name))
    return max(errors)
