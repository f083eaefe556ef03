"""Gradients into, and numbers out of, an optimizer by their place in whole parameters.

The same numbers go into every sharding, so what comes out may not differ by a bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from amsf_dist import AMSF, kernels
from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.lines import flat_line, put_back
from amsf_dist.shards import Piece


def step_with(optimizer: AMSF, steps: Iterable[int], size: float = 1e-2) -> None:
    """Steps whose gradients depend on the parameter's name and the step alone."""
    for step in steps:
        for holding in optimizer.holdings:
            grad = torch.zeros_like(holding.param.detach())
            memory = holding.memory(grad)
            for piece in holding.layout.pieces:
                line = flat_line(memory, piece)
                for here, places in _spans(piece):
                    line[here] = _gradient(piece, step, size)[places].to(line.dtype)
                put_back(memory, piece, line)
            holding.param.grad = grad
        optimizer.step()


def whole_numbers(optimizer: AMSF, what: str) -> dict[str, Tensor]:
    """Name -> [numel] numbers in line order, of all ranks: "y" or a line of the rule."""
    mine = [
        (piece.part.name, math.prod(piece.part.shape), places, line[here].clone())
        for holding in optimizer.holdings
        for piece in holding.layout.pieces
        for line in [flat_line(_memory(holding, what), piece)]
        for here, places in _spans(piece)
    ]
    gathered: list[Any] = [mine]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
    found: dict[str, Tensor] = {}
    for name, numel, places, values in (entry for rank in gathered for entry in rank):
        found.setdefault(name, torch.full((numel,), torch.nan))[places] = values.float()
    assert not any(value.isnan().any() for value in found.values())
    return found


def _memory(holding: Holding, what: str) -> Tensor:
    if what == "y":
        return holding.memory(holding.param)
    return kernels.read_line(holding, holding.rule.lines.index(what))


def _gradient(piece: Piece, step: int, size: float) -> Tensor:
    seed = sum(map(ord, piece.part.name)) + 1000 * step
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(math.prod(piece.part.shape), generator=generator) * size


def _spans(piece: Piece) -> Iterator[tuple[slice, Tensor]]:
    """(where in the flat line, places in the parameter's line)."""
    for span in piece.spans:
        stop = span.position + math.prod(span.lengths)
        if stop > span.position:
            here = slice(span.position, stop)
            yield here, span.places(here.start, here.stop, torch.device("cpu"))
