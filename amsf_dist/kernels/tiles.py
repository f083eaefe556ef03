"""How a kernel walks over the memory of a piece: flat in line order, in tiles of whole blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from amsf_dist.kernels.holding import Holding
from amsf_dist.shards import Piece
from amsf_dist.shards.runs import Section

__all__ = [
    "flat_line",
    "flat_lines",
    "flat_tensors",
    "put_all_back",
    "put_back",
    "sections",
    "tiles",
]

# Numbers per tile. On a CPU the handful of fp32 temporaries then stays in the second-level cache;
# on a GPU every tile is some launches, so it is as large as memory peaks allow (64 MiB in fp32).
_TILE_NUMEL = {"cpu": 64 * 1024}
_TILE_NUMEL_DEVICE = 16 * 1024 * 1024


def sections(piece: Piece) -> Iterator[Section]:
    """Of the piece's runs, in memory order."""
    return (section for run in piece.runs for section in run.sections())


def tiles(piece: Piece, device: torch.device) -> Iterator[Section]:
    """The piece's sections, cut to at most a tile: whole blocks together, or a part of one."""
    tile_numel = _TILE_NUMEL.get(device.type, _TILE_NUMEL_DEVICE)
    for section in sections(piece):
        numel = (section.stop - section.start) // section.num_blocks
        if numel > tile_numel:
            for block in range(section.num_blocks):
                first = section.start + block * numel
                for start in range(first, first + numel, tile_numel):
                    stop = min(start + tile_numel, first + numel)
                    yield Section(start, stop, section.first_block + block, 1)
        else:
            step = tile_numel // numel
            for block in range(0, section.num_blocks, step):
                count = min(step, section.num_blocks - block)
                start = section.start + block * numel
                yield Section(start, start + count * numel, section.first_block + block, count)


def flat_line(memory: Tensor, piece: Piece) -> Tensor:
    """Memory as the flat line the runs count in; a copy where the weight lies in another order."""
    views = _views(memory, piece)
    return views[0].reshape(-1) if len(views) == 1 else torch.cat([v.reshape(-1) for v in views])


def flat_tensors(memory: Sequence[Tensor], piece: Piece) -> tuple[Tensor, ...]:
    """The tensors of one storage, flat in line order."""
    return tuple(flat_line(tensor, piece) for tensor in memory)


def flat_lines(holding: Holding, piece: Piece) -> tuple[tuple[Tensor, ...], ...]:
    """Memory of the rule's lines, flat in line order."""
    return tuple(flat_tensors(line.tensors, piece) for line in holding.lines)


def put_all_back(memory: Sequence[Tensor], piece: Piece, lines: Sequence[Tensor]) -> None:
    """The same for the tensors of one storage."""
    for tensor, line in zip(memory, lines, strict=True):
        put_back(tensor, piece, line)


def put_back(memory: Tensor, piece: Piece, line: Tensor) -> None:
    """Write a line back when `flat_line` had to copy."""
    start = 0
    for view in _views(memory, piece):
        part = line[start : start + view.numel()]
        if part.data_ptr() != view.data_ptr():
            view.copy_(part.view(view.shape))
        start += view.numel()


def _views(memory: Tensor, piece: Piece) -> list[Tensor]:
    """The memory with its dims in line order: as a whole, or box by box."""
    order = piece.part.blocks.order
    if not piece.boxes:
        # a flat tensor holds intervals of lines, or boxes
        return [memory if order is None or memory.dim() == 1 else memory.permute(order)]
    assert order is not None
    boxes = [(memory[b.offset :][: math.prod(b.shape)].view(b.shape)) for b in piece.boxes]
    return [box.permute(order) for box in boxes]
