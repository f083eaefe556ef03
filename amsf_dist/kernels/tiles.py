"""How a kernel walks over a piece: in tiles of whole blocks, or of a part of one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from amsf_dist.shards import Piece
from amsf_dist.shards.runs import Section
from amsf_dist.storage import Groups

__all__ = ["Tile", "cut", "sections", "tiles"]

# Numbers per tile. On a CPU the handful of fp32 temporaries then stays in the second-level cache;
# on a GPU every tile is some launches, so it is as large as memory peaks allow (64 MiB in fp32).
_TILE_NUMEL = {"cpu": 64 * 1024}
_TILE_NUMEL_DEVICE = 16 * 1024 * 1024


def sections(piece: Piece) -> Iterator[Section]:
    """Of the piece's runs, in memory order."""
    return (section for run in piece.runs for section in run.sections())


class Tile(NamedTuple):
    """A section that a kernel takes at once; see `Section`.

    Attributes:
        start: first number of the piece's flat line.
        stop: end.
        first_block: of the tensor's block vector.
        num_blocks: that share the numbers equally.
        first_group: of the tensor's scales, where lines are stored in groups (grouping.py).
        phase: numbers of that group that lie before the tile.
        shared: which shared groups its first and its last are; -1: they lie in this tile alone.
    """

    start: int
    stop: int
    first_block: int
    num_blocks: int
    first_group: int = 0
    phase: int = 0
    shared: tuple[int, int] = (-1, -1)

    @classmethod
    def of(cls, section: Section, first_group: int = 0, phase: int = 0) -> Tile:
        """The whole section."""
        return cls(
            section.start,
            section.stop,
            section.first_block,
            section.num_blocks,
            first_group,
            phase,
        )

    @property
    def section(self) -> Section:
        """Without what concerns groups."""
        return Section(self.start, self.stop, self.first_block, self.num_blocks)

    @property
    def span(self) -> slice:
        """Of the flat line."""
        return slice(self.start, self.stop)

    @property
    def groups(self) -> Groups:
        """For storages whose numbers share scales."""
        return Groups(self.first_group, self.phase)


def tiles(piece: Piece, device: torch.device) -> Iterator[Tile]:
    """The piece's sections, cut to tiles."""
    return (tile for section in sections(piece) for tile in cut(section, device.type))


def cut(section: Section, device_type: str, group: int = 1) -> Iterator[Tile]:
    """A section in parts of at most a tile: whole blocks together, or a part of one.

    Args:
        section: of a piece.
        device_type: decides how large a tile is.
        group: tiles are multiples of so many numbers where blocks permit.
    """
    tile_numel = _TILE_NUMEL.get(device_type, _TILE_NUMEL_DEVICE)
    numel = (section.stop - section.start) // section.num_blocks
    if numel > tile_numel:
        for block in range(section.num_blocks):
            first = section.start + block * numel
            for start in range(first, first + numel, tile_numel):
                stop = min(start + tile_numel, first + numel)
                yield Tile(start, stop, section.first_block + block, 1)
    else:
        step = tile_numel // numel
        together = group // math.gcd(group, numel)
        step -= step % together if step >= together else 0
        for block in range(0, section.num_blocks, step):
            count = min(step, section.num_blocks - block)
            start = section.start + block * numel
            yield Tile(start, start + count * numel, section.first_block + block, count)
