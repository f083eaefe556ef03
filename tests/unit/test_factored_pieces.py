"""Rows and columns at once: every number finds its column, wherever it was cut."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_runs import (
    Setting,
    groups_are_the_ranks_in_them,
    in_line_order,
    quick,
    settings_on_meshes,
    slices,
)
from torch import Tensor
from torch.distributed.tensor import Replicate

from amsf_dist.architecture import Facts
from amsf_dist.blocks import Blocks, resolve
from amsf_dist.kernels.factored import by_column
from amsf_dist.kernels.lines import flat_line
from amsf_dist.kernels.tiles import Tile
from amsf_dist.shards import Layout, Part, Piece
from amsf_dist.shards.flat import flat_layout
from amsf_dist.shards.others import with_others

__all__ = ["groups_are_the_ranks_in_them"]


@st.composite
def matrices(draw: st.DrawFn, size: int = 6) -> Part:
    """A weight with rows and columns, its dims stored in any order; rows are the leading ones."""
    line = draw(st.lists(st.integers(1, size), min_size=2, max_size=4))
    order = draw(st.permutations(range(len(line))).map(tuple))
    role = draw(st.sampled_from(["linear", "experts"]))
    shape = [0] * len(line)
    for position, dim in enumerate(order):
        shape[dim] = line[position]
    blocks = resolve("factored", "w", shape, facts=Facts(role, order=order))
    return Part("w", tuple(shape), blocks)


def assert_columns(piece: Piece, kept: Tensor, expected: Tensor) -> None:
    """Sections of a piece find the columns of their numbers.

    Args:
        piece: cut by rows.
        kept: numbers of the columns whose moments lie here.
        expected: for every number of the piece's flat line its column.
    """
    for section in (s for run in piece.runs for s in run.sections()):
        found = by_column(piece, Tile.of(section), kept)
        here = expected[section.start : section.stop].view(section.num_blocks, -1)
        assert torch.equal(found.expand_as(here), here)


@quick(200)
@given(matrices(), settings_on_meshes())
def test_on_a_mesh(part: Part, like: Setting) -> None:
    if part.blocks.kind != "factored":
        return
    dims = len(part.shape)
    if any(not isinstance(p, Replicate) and p.dim >= dims for p in like.placements):
        return
    rows = Setting(part, like.mesh, like.placements)
    columns, mean = (
        Setting(replace(part, blocks=way), like.mesh, like.placements) for way in part.blocks.others
    )
    for rank in rows.ranks():

        def produce(parts: Any, places: Any, rank: Any = rank) -> Layout:
            return Setting(parts[0], like.mesh, like.placements).layout(rank)

        (piece,) = with_others([part], produce).pieces
        by_columns, by_all = piece.others
        kept = columns.vector_here(rank)
        assert by_columns.num_blocks == kept.numel()
        assert by_all.num_blocks == 1 and len(mean.cut) == len(spread(rows))
        assert_columns(piece, kept, rows.line_here(rank) % part.blocks.block_numel)


def spread(setting: Setting) -> list[int]:
    """Mesh dims that cut the parameter."""
    return [
        dim
        for dim, placement in enumerate(setting.placements)
        if setting.mesh[dim] > 1 and not isinstance(placement, Replicate)
    ]


@quick(200)
@given(
    st.lists(matrices(4) | st.just(Part("b", (5,), Blocks("element", 1))), min_size=1, max_size=3),
    st.integers(1, 5),
)
def test_in_a_flat_tensor(inside: list[Part], world_size: int) -> None:
    sizes = [math.prod(part.shape) for part in inside]
    starts = [sum(sizes[:n]) for n in range(len(inside))]
    length = -(-sum(sizes) // world_size)
    columns = torch.full((length * world_size,), -1)
    for part, start, size in zip(inside, starts, sizes, strict=True):
        places = torch.empty(size, dtype=torch.int64)
        places[in_line_order(torch.arange(size), part)] = torch.arange(size)
        columns[start : start + size] = places % part.blocks.block_numel
    for rank in range(world_size):
        flat = slices(inside, starts, length, rank, world_size)

        def produce(parts: Any, places: Any, flat: Any = flat) -> Layout:
            return flat_layout(parts, [flat[place] for place in places])

        layout = with_others(inside, produce)
        memory = columns[rank * length : (rank + 1) * length]
        assert len(layout.others) == (2 if any(part.blocks.others for part in inside) else 0)
        for piece in layout.pieces:
            if piece.others and piece.runs:
                kept = torch.arange(piece.others[0].num_blocks)
                assert_columns(piece, kept, flat_line(memory, piece))
