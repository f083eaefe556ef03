"""Slices of flat buffers, cut without regard to rows: FSDP1's parameters, ZeRO's partitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from amsf_dist.shards.layout import Axis, Box, Cut, Layout, Part, Piece, Span
from amsf_dist.shards.runs import Run, box_runs, interval_boxes
from amsf_dist.shards.seams import seam_everywhere, seam_of_boundaries
from amsf_dist.shards.vector import line_shape

__all__ = ["FlatSlice", "flat_layout"]

_IN_ANY_ORDER = ("element", "tensor", "mean")  # blocks of these are runs of every order of the dims


@dataclass(frozen=True)
class FlatSlice:
    """Which interval of a parameter's numbers lies where in a visible tensor.

    Attributes:
        name: canonical name of the parameter.
        shape: of the whole parameter.
        offset: first number in the visible tensor.
        start: first number in the parameter, row-major as it is stored; [start, stop) lies here.
        stop: end in the parameter; equal to start where nothing lies here.
        boundaries: places in the parameter where another rank's part begins, on any rank.
        axis: ranks that hold the rest of the buffer, and perhaps of the parameter.
        sharded: whether they do; False: all hold all of it.
        moments_by_element: whether a state dict must keep block moments as large as the tensor.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    start: int
    stop: int
    boundaries: tuple[int, ...]
    axis: Axis
    sharded: bool = True
    moments_by_element: bool = False


def flat_layout(parts: Sequence[Part], slices: Sequence[FlatSlice]) -> Layout:
    """The layout of a visible tensor that holds these slices."""
    pieces: list[Piece] = []
    sums: list[int] = []
    slots: list[int] = []
    first_block = first_sum = num_slots = 0
    for part, here in zip(parts, slices, strict=True):
        transposed = part.blocks.order is not None and part.blocks.kind not in _IN_ANY_ORDER
        place = _transposed if transposed else _in_order
        piece, first, cut = place(part, here, first_block, first_sum)
        for slot, block in enumerate(cut):
            if first <= block < first + piece.num_blocks:
                sums.append(first_sum + block - first)
                slots.append(num_slots + slot)
        pieces.append(piece)
        first_block += piece.num_blocks
        first_sum += piece.num_sums
        num_slots += len(cut)
    axis = slices[0].axis
    # not "if anything is cut": what lies whole on this rank is not seen by the others
    spread = axis.size > 1 and slices[0].sharded
    return Layout(
        pieces=tuple(pieces),
        cuts=(Cut(axis, num_slots, sums, slots),) if num_slots else (),
        spread=(axis,) if spread else (),
        local=_line_of_numbers,
        first=slices[0].offset if slices[0].start == 0 < slices[0].stop else None,
        flat=True,
        moments_by_element=slices[0].moments_by_element,
    )


def _in_order(
    part: Part, here: FlatSlice, first_block: int, first_sum: int
) -> tuple[Piece, int, Sequence[int]]:
    """An interval of the parameter's line: one run.

    Returns:
        The piece; the first block here; the blocks of the whole parameter that ranks share.
    """
    size = part.blocks.block_numel
    runs = box_runs([math.prod(part.shape)], [here.start], [here.stop - here.start], size)
    first = here.start // size
    cut = sorted({b // size for b in here.boundaries if b % size})
    moved = tuple(_moved(run, here.offset, first_block - first) for run in runs)
    num_blocks = runs[0].num_blocks if runs else 0
    numel = math.prod(part.shape)
    span = Span(here.offset, (numel,), (here.start,), (here.stop - here.start,))
    kept = Span(first_block, (part.num_blocks,), (first,), (num_blocks,))
    piece = Piece(
        part,
        moved,
        first_block,
        num_blocks,
        first_sum,
        len(cut),
        spans=(span,),
        seam=seam_of_boundaries(here.boundaries, numel, here.axis),
        kept=kept,
    )
    return piece, first, cut


def _transposed(
    part: Part, here: FlatSlice, first_block: int, first_sum: int
) -> tuple[Piece, int, Sequence[int]]:
    """An interval of a weight whose rows lie across memory (GPT-2's `Conv1D`): a few boxes.

    Almost every rank has numbers of almost every row, so all its blocks count as cut.
    """
    order = part.blocks.order
    assert order is not None
    line, numel = line_shape(part.shape, part.blocks), 0
    boxes: list[Box] = []
    spans: list[Span] = []
    runs: list[Run] = []
    for offsets, lengths in interval_boxes(part.shape, here.start, here.stop):
        boxes.append(Box(here.offset + numel, tuple(lengths)))
        starts = tuple(offsets[dim] for dim in order)
        sizes = tuple(lengths[dim] for dim in order)
        of_box = box_runs(line, starts, sizes, part.blocks.block_numel)
        spans.append(Span(numel, line, starts, sizes))
        runs += [_moved(run, numel, first_block) for run in of_box]
        numel += math.prod(lengths)
    num_blocks = part.num_blocks if runs else 0
    cut = range(part.num_blocks) if here.boundaries else ()
    piece = Piece(
        part,
        tuple(runs),
        first_block,
        num_blocks,
        first_sum,
        len(cut),
        tuple(boxes),
        tuple(spans),
        seam_everywhere((here.axis,) if here.boundaries else (), math.prod(part.shape)),
        kept=Span(first_block, (part.num_blocks,), (0,), (num_blocks,)),
    )
    return piece, 0, cut


def _moved(run: Run, offset: int, blocks: int) -> Run:
    return replace(run, offset=run.offset + offset, first_block=run.first_block + blocks)


def _line_of_numbers(tensor: Tensor) -> Tensor:
    return tensor.view(-1)
