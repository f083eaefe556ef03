"""The geometry: which part of each block lies in a box of numbers that one rank holds.

A parameter is a line of numbers, a block an equal run of it. A rank holds a box: in every dim an
interval of the parameter. Its memory, read in order, is then a few *runs*: contiguous numbers cut
by block boundaries at equal distances, with at most one part of a block at each end.

    blocks     |--------|--------|--------|--------|     of 9 numbers each
    run             [---|--------|-----)                 phase 5, numel 19
    sections        head   body    tail                  4, 1 x 9 and 6 numbers

Pure arithmetic: no tensors, no processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

__all__ = [
    "Run",
    "Section",
    "box_runs",
    "contiguous_runs",
    "in_whole_runs",
    "interval_boxes",
    "local_blocks",
]


@dataclass(frozen=True)
class Section:
    """Numbers [start, stop) of the memory, shared equally by blocks [first_block, +num_blocks)."""

    start: int
    stop: int
    first_block: int
    num_blocks: int

    def clip(self, start: int, stop: int) -> Iterator[Section]:
        """Numbers [start, stop) of it."""
        start, stop = max(start, self.start), min(stop, self.stop)
        if start < stop:
            size = (self.stop - self.start) // self.num_blocks
            blocks, phase = divmod(start - self.start, size)
            yield from Run(start, stop - start, phase, size, self.first_block + blocks).sections()


@dataclass(frozen=True)
class Run:
    """Contiguous numbers of this rank's memory, cut in blocks.

    Attributes:
        offset: first number, counted in the memory.
        numel: how many numbers.
        phase: numbers of the first block that lie before this run (on another rank).
        block_numel: numbers per block along this run.
        first_block: index of the first block it touches, in the whole parameter or (after
            `local_blocks`) in this rank's part of the block vector.
    """

    offset: int
    numel: int
    phase: int
    block_numel: int
    first_block: int

    @property
    def num_blocks(self) -> int:
        """Blocks this run touches, whole or in part."""
        return -(-(self.phase + self.numel) // self.block_numel)

    @property
    def whole(self) -> bool:
        """Whether it begins and ends where blocks do."""
        return self.phase == 0 and self.numel % self.block_numel == 0

    def sections(self) -> Iterator[Section]:
        """Head (part of a block), body (whole blocks), tail (part of a block); empty ones left out.

        The head is the part of a block that another run began.
        """
        start, stop, block = self.offset, self.offset + self.numel, self.first_block
        if self.phase:
            head = min(self.numel, self.block_numel - self.phase)
            yield Section(start, start + head, block, 1)
            start, block = start + head, block + 1
        if num_blocks := (stop - start) // self.block_numel:
            yield Section(start, start + num_blocks * self.block_numel, block, num_blocks)
            start, block = start + num_blocks * self.block_numel, block + num_blocks
        if start < stop:
            yield Section(start, stop, block, 1)


def box_runs(
    shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], block_numel: int
) -> tuple[Run, ...]:
    """Runs of the box [offsets, offsets + lengths) of a parameter, blocks counted in all of it.

    Args:
        shape: of the whole parameter, in line order.
        offsets: first index of the box in every dim.
        lengths: of the box in every dim; the memory is contiguous in this shape.
        block_numel: numbers per block of the parameter's line.

    Returns:
        Runs in memory order; none when the box is empty.
    """
    if math.prod(lengths) == 0:
        return ()
    dims = _merged(list(zip(shape, offsets, lengths, strict=True)))
    return tuple(_box_runs(dims, block_numel))


def contiguous_runs(
    shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], block_numel: int
) -> Iterator[Run]:
    """Runs of a box, every one contiguous in the parameter's line too; see `box_runs`.

    Args:
        shape: of the whole parameter, in line order.
        offsets: first index of the box in every dim.
        lengths: of the box in every dim.
        block_numel: numbers per block of the parameter's line.
    """
    if math.prod(lengths):
        yield from _contiguous(
            _merged(list(zip(shape, offsets, lengths, strict=True))), block_numel
        )


def in_whole_runs(
    shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], block_numel: int
) -> bool:
    """Whether a box is many runs that all begin and end where blocks do.

    Args:
        shape: of the whole parameter, in line order.
        offsets: first index of the box in every dim.
        lengths: of the box in every dim.
        block_numel: numbers per block of the parameter's line.
    """
    dims = _merged(list(zip(shape, offsets, lengths, strict=True)))
    return len(dims) > 1 and all(number % block_numel == 0 for number in dims[-1])


def interval_boxes(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Numbers [start, stop) of an array in row-major order, as boxes one after another.

    Args:
        shape: of the array, one dim or more.
        start: first number.
        stop: end.

    Yields:
        (offsets, lengths) of a box per dim; none of them empty.
    """
    if start >= stop:
        return
    inner = math.prod(shape[1:])
    if inner == 1:  # also what remains of trailing dims of one
        yield [start, *(0 for _ in shape[1:])], [stop - start, *shape[1:]]
        return
    first, last = -(-start // inner), stop // inner  # rows [first, last) are whole
    head = min(first * inner, stop)
    yield from _in_row(shape, start, head)
    if first < last:
        yield [first, *(0 for _ in shape[1:])], [last - first, *shape[1:]]
    yield from _in_row(shape, max(last * inner, head), stop)


def _in_row(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[list[int], list[int]]]:
    inner = math.prod(shape[1:])
    row = start // inner
    for offsets, lengths in interval_boxes(shape[1:], start - row * inner, stop - row * inner):
        yield [row, *offsets], [1, *lengths]


def local_blocks(
    runs: Sequence[Run], shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]
) -> tuple[Run, ...]:
    """The same runs with blocks counted in the part of the block vector that lies here.

    Args:
        runs: blocks counted in the whole parameter.
        shape: of the whole block vector; [offsets, offsets + lengths) of it lies here.
        offsets: first index in every dim.
        lengths: in every dim.

    Returns:
        Runs in memory order; neighbours that hold whole blocks are joined into one.
    """
    joined: list[Run] = []
    for run in runs:
        block, local, stride = run.first_block, 0, 1
        for size, offset, length in zip(shape[::-1], offsets[::-1], lengths[::-1], strict=True):
            block, index = divmod(block, size)
            local, stride = local + (index - offset) * stride, stride * length
        run = replace(run, first_block=local)
        if joined and _continues(joined[-1], run):
            joined[-1] = replace(joined[-1], numel=joined[-1].numel + run.numel)
        else:
            joined.append(run)
    return tuple(joined)


def _continues(run: Run, after: Run) -> bool:
    return (
        run.whole
        and after.whole
        and run.block_numel == after.block_numel
        and run.offset + run.numel == after.offset
        and run.first_block + run.num_blocks == after.first_block
    )


_Dim = tuple[int, int, int]  # size, offset, length


def _merged(dims: list[_Dim]) -> list[_Dim]:
    """Fewest dims that describe the box: a dim held entirely joins the one before it."""
    merged: list[_Dim] = [(1, 0, 1)]
    for size, offset, length in dims:
        before_size, before_offset, before_length = merged[-1]
        if length == size:
            merged[-1] = (before_size * size, before_offset * size, before_length * size)
        elif before_size == 1:
            merged[-1] = (size, offset, length)
        else:
            merged.append((size, offset, length))
    return merged


def _box_runs(dims: list[_Dim], block_numel: int) -> Iterator[Run]:
    size, _, length = dims[-1]
    if len(dims) > 1 and block_numel % size == 0:
        # Blocks are whole multiples of the inner dim, of which `length` numbers lie here: the outer
        # dims alone decide, with every one of their elements standing for `length` numbers.
        for run in _box_runs(dims[:-1], block_numel // size):
            yield Run(
                run.offset * length,
                run.numel * length,
                run.phase * length,
                run.block_numel * length,
                run.first_block,
            )
    else:
        yield from _contiguous(dims, block_numel)


def _contiguous(dims: list[_Dim], block_numel: int) -> Iterator[Run]:
    size, offset, length = dims[-1]
    for index, row in enumerate(_outer_indices(dims[:-1])):
        start = row * size + offset
        yield Run(index * length, length, start % block_numel, block_numel, start // block_numel)


def _outer_indices(dims: list[_Dim]) -> Iterator[int]:
    """Positions of the box's outer elements in the whole line of the outer dims."""
    if not dims:
        yield 0
        return
    size, offset, length = dims[-1]
    for outer in _outer_indices(dims[:-1]):
        for index in range(offset, offset + length):
            yield outer * size + index
