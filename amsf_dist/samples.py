"""A sample of a parameter's numbers, from blocks that are the same under every sharding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amsf_dist.kernels.tiles import sections
from amsf_dist.shards import Piece

__all__ = ["MOST_BLOCKS", "Sample"]

MOST_BLOCKS = 64
_NUMBERS = 65536  # of a piece, if no block is cut; the blocks have equal parts of it


class Sample:
    """Which numbers of a piece are looked at: the first ones of every n-th block.

    Blocks are those of the second moment, and counted in the whole parameter, so that the ranks
    that share a block know it by the same slot. A parameter whose blocks are its numbers counts as
    one block.

    Attributes:
        positions: [n] int64, of the numbers in the piece's flat line.
        slots: [n] int64 in [0, MOST_BLOCKS), of the blocks that they belong to.
    """

    def __init__(self, piece: Piece, device: torch.device) -> None:
        """Choose.

        Args:
            piece: of some parameter.
            device: of its memory.
        """
        part = piece.part
        num_blocks = 1 if part.elementwise else part.num_blocks
        every = -(-num_blocks // MOST_BLOCKS)
        most = _NUMBERS // max(1, -(-num_blocks // every))
        positions, slots = [], []
        for section in sections(piece):
            count = 1 if part.elementwise else section.num_blocks
            numel = (section.stop - section.start) // count
            first = section.start + numel * torch.arange(count, device=device)
            if part.elementwise:
                block = torch.zeros_like(first)
            else:
                place = piece.span_of(section.start).places_of(first)
                block = place.div(part.blocks.block_numel, rounding_mode="floor")
            chosen = block % every == 0
            numbers = torch.arange(min(numel, most), device=device)
            positions.append((first[chosen, None] + numbers).flatten())
            slots.append((block[chosen] // every).repeat_interleave(len(numbers)))
        self.positions, self.slots = _joined(positions, device), _joined(slots, device)

    def of(self, line: Tensor) -> Tensor:
        """[n] the numbers, out of the piece's flat line."""
        return line[self.positions]

    def per_block(self, told: Tensor) -> Tensor:
        """[MOST_BLOCKS] fp64: of how many numbers of each block it holds.

        Args:
            told: [n] bool.
        """
        return torch.bincount(self.slots[told], minlength=MOST_BLOCKS).double()


def _joined(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    none = torch.empty(0, dtype=torch.int64, device=device)
    return torch.cat([none, *parts])
