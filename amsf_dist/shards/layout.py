"""Where one visible tensor's numbers lie on this rank, and with whom its blocks are shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from amsf_dist.blocks import Blocks
from amsf_dist.shards.runs import Run

__all__ = ["Axis", "Layout", "Piece", "itself"]


def itself(tensor: Tensor) -> Tensor:
    """The tensor: what is visible is this rank's memory."""
    return tensor


@dataclass(frozen=True)
class Axis:
    """Ranks over which block sums of a cut parameter are added.

    Attributes:
        group: process group; None where there are no processes (a plan on paper).
        size: ranks in it.
        device_type: where its collectives want their tensors (the parameters may be offloaded).
    """

    group: Any
    size: int
    device_type: str


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that lies in one tensor here.

    Attributes:
        name: of the parameter, without wrapper prefixes; "" when it has none.
        shape: of the whole parameter.
        blocks: how its line is cut.
        runs: this rank's part; offsets in the tensor's memory (in line order), blocks counted in
            the tensor's block vector.
        first_block: where the piece's blocks begin in the tensor's block vector.
        num_blocks: how many they are; also blocks that lie elsewhere entirely, when the moments of
            a cut parameter are kept by all its ranks.
    """

    name: str
    shape: tuple[int, ...]
    blocks: Blocks
    runs: tuple[Run, ...]
    first_block: int
    num_blocks: int


@dataclass(frozen=True)
class Layout:
    """All pieces of one tensor that the optimizer sees.

    Attributes:
        pieces: in memory order.
        num_blocks: length of this rank's block vector (block sums, second moment).
        axes: over which the whole block vector is summed; empty when no block is cut.
        spread: over which other parts of the tensor lie, cut or not.
        local: tensor as seen (parameter, gradient, line) -> this rank's memory.
        as_state: this rank's block vector -> how it stands in the optimizer's state.
    """

    pieces: tuple[Piece, ...]
    num_blocks: int
    axes: tuple[Axis, ...] = ()
    spread: tuple[Axis, ...] = ()
    local: Callable[[Tensor], Tensor] = field(default=itself)
    as_state: Callable[[Tensor], Tensor] = field(default=itself)
