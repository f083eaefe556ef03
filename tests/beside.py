"""A plain optimizer beside a sharded one, given the very gradients that the shards were given.

In bf16 the gradients themselves depend on the sharding: they are sums over ranks, rounded to eight
bits. What an optimizer does with them need not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from layouts import LAYOUTS, OPTIONS, SHAPES, assembled, loss_of, moments, weights, whole
from models import Transformer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from amsf_dist import AMSF
from amsf_dist.blocks import canonical_name

STEPS = 6  # one more than the warm-up


def beside_one_process(
    layout: str, shape: str, dtype: torch.dtype, rules: list[tuple[str, str, bool]]
) -> Any:
    """Train under every (blocks, averaging, deterministic).

    Returns:
        Rule -> what ("y", "x", "v") -> (under the layout, in one process), each by name.
    """
    results = {}
    under, vocab = LAYOUTS[layout], SHAPES[shape].vocab
    rank = dist.get_rank() // under.tensor_parallel
    world_size = dist.get_world_size() // under.tensor_parallel
    for blocks, averaging, deterministic in rules:
        options = {"blocks": blocks, "averaging": averaging, "deterministic": deterministic}
        model = under.wrap(Transformer(SHAPES[shape], dtype=dtype))
        plain = Transformer(SHAPES[shape], dtype=dtype)
        both = [(module, AMSF(module, **options, **OPTIONS)) for module in (model, plain)]
        for step in range(STEPS):
            both[0][1].zero_grad()
            loss_of(model, vocab, step, rank, world_size).backward()
            for name, grad in _gradients(*both[0]).items():
                plain.get_parameter(name).grad = grad
            for _, optimizer in both:
                optimizer.step()
        values = {
            "y": [weights(*one) for one in both],
            "v": [moments(*one) for one in both],
        }
        for _, optimizer in both:
            optimizer.eval()
        values["x"] = [weights(*one) for one in both]
        results[blocks, averaging, deterministic] = values
    return results


def _gradients(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Canonical name -> whole gradient."""
    if isinstance(model, FullyShardedDataParallel):
        flats = optimizer._flats
        # FSDP1 has no gradient where no part of the parameter lies
        held = {p: p.detach() if p.grad is None else p.grad for p in flats}
        assert all(p.grad is not None or not p.numel() for p in flats)
        return assembled([(flat, held[p].view(-1)) for p in flats for flat in flats[p]])
    return {canonical_name(name): whole(param.grad) for name, param in model.named_parameters()}
