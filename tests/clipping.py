"""Clipping by the global norm under every sharding."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor


def clip_(model: nn.Module, max_norm: float) -> None:
    """Clip by the global norm. torch's function wants all DTensors on one mesh, FSDP1's no fp64."""
    dtype = next(model.parameters()).dtype
    if isinstance(model, FullyShardedDataParallel) and dtype != torch.float64:
        model.clip_grad_norm_(max_norm)
        return
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    total = torch.zeros((), dtype=torch.float64)
    for grad in grads:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        total += local.double().square().sum() * _parts(model, grad)
    if dist.is_initialized():
        total /= dist.get_world_size()  # the parts lie on fewer ranks, or replicas send them too
        dist.all_reduce(total)
    factor = float((max_norm / (total.sqrt() + 1e-6)).clamp(max=1.0))
    for grad in grads:
        grad.mul_(factor)


def _parts(model: nn.Module, grad: Tensor) -> int:
    """Into how many parts a gradient is cut."""
    if isinstance(model, FullyShardedDataParallel):
        whole_here = model.sharding_strategy == ShardingStrategy.NO_SHARD
        return 1 if whole_here else model.process_group.size()
    if not isinstance(grad, DTensor):
        return 1
    sizes = zip(grad.device_mesh.shape, grad.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())
