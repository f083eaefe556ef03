"""Where one visible tensor's numbers lie on this rank, and with whom its blocks are shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amsf_dist.blocks import Blocks
from amsf_dist.shards.runs import Run

__all__ = ["Axis", "Box", "Cut", "Layout", "Part", "Piece", "Seam", "Span", "itself"]


def itself(tensor: Tensor) -> Tensor:
    """The tensor: what is visible is this rank's memory."""
    return tensor


@dataclass(frozen=True)
class Axis:
    """Ranks that hold parts of the same parameters.

    Attributes:
        group: process group; None where there are no processes (a plan on paper).
        size: ranks in it.
        device_type: where its collectives want their tensors (the parameters may be offloaded).
        replicas: how many of the ranks hold the same part.
    """

    group: Any
    size: int
    device_type: str
    replicas: int = 1


@dataclass(frozen=True)
class Part:
    """One parameter in a visible tensor: most tensors are one, a flat parameter has many.

    Attributes:
        name: without wrapper prefixes; "" when it has none.
        shape: of the whole parameter.
        blocks: how its line is cut.
    """

    name: str
    shape: tuple[int, ...]
    blocks: Blocks

    @property
    def elementwise(self) -> bool:
        """Whether every block is one number, so that nothing needs summing."""
        return self.blocks.kind == "element"

    @property
    def num_blocks(self) -> int:
        """Blocks in the whole parameter."""
        return self.blocks.num_blocks(self.shape)


@dataclass(frozen=True)
class Box:
    """A stretch of a flat tensor's memory that is a box of a parameter.

    Attributes:
        offset: first number in the memory.
        shape: of the box, dims in the order in which the parameter is stored.
    """

    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """A box of a parameter, together in a piece's flat line.

    Attributes:
        position: of its first number in the flat line.
        shape: of the whole parameter, in line order.
        offsets: first index of the box in every dim.
        lengths: of the box in every dim.
    """

    position: int
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    def places(self, start: int, stop: int, device: torch.device) -> Tensor:
        """[stop - start] int64: places in the parameter's line of the flat line's [start, stop).

        The same number has the same place under every sharding.
        """
        return self.places_of(torch.arange(start, stop, device=device))

    def places_of(self, positions: Tensor) -> Tensor:
        """[n] int64: the same of numbers anywhere in the box, by their positions in the line."""
        left = positions - self.position
        places, stride = torch.zeros_like(left), 1
        merged = 1  # trailing dims that lie here whole are one dim
        for size, offset, length in zip(
            self.shape[::-1], self.offsets[::-1], self.lengths[::-1], strict=True
        ):
            if size == length:
                merged *= size
                continue
            size, offset, length, merged = size * merged, offset * merged, length * merged, 1
            places += (left % length + offset) * stride
            left, stride = left.div(length, rounding_mode="floor"), stride * size
        return places + left * stride

    def place(self, position: int) -> int:
        """The place of one number, by its position in the flat line; see `places`."""
        left, place, stride = position - self.position, 0, 1
        for size, offset, length in zip(
            self.shape[::-1], self.offsets[::-1], self.lengths[::-1], strict=True
        ):
            left, index = divmod(left, length)
            place, stride = place + (index + offset) * stride, stride * size
        return place

    def position_of(self, place: int) -> int:
        """The position of a number of the box, by its place in the parameter's line."""
        position, stride = self.position, 1
        for size, offset, length in zip(
            self.shape[::-1], self.offsets[::-1], self.lengths[::-1], strict=True
        ):
            place, index = divmod(place, size)
            position, stride = position + (index - offset) * stride, stride * length
        return position


@dataclass(frozen=True)
class Seam:
    """A part's share in the payload of peaks, where ranks share groups of its line (seams.py).

    Attributes:
        axes: over which the largest number of a group is sought, one after another.
        num_slots: numbers in the payload, the same on every rank.
        slots: group of the part -> its slot; None: every group has one, in order.
    """

    axes: tuple[Axis, ...]
    num_slots: int
    slots: Mapping[int, int] | None = None


@dataclass(frozen=True)
class Piece:
    """What lies here of one part.

    Attributes:
        part: the parameter.
        runs: this rank's part of its line; offsets in the tensor's memory (in line order; in the
            boxes one after another where there are boxes), blocks counted in the tensor's block
            vector.
        first_block: where the piece's blocks begin in the tensor's block vector.
        num_blocks: how many they are; also blocks that lie elsewhere entirely, when the moments of
            a cut parameter are kept by all its ranks.
        first_sum: where its sums begin in the tensor's sums.
        cut_blocks: how many blocks of the whole parameter are shared by ranks.
        boxes: where it lies, if in a flat tensor and in another order than its line.
        spans: which numbers of the parameter's line they are.
        seam: where ranks share groups of its line; None where no group is cut.
        kept: which of the part's blocks have their moments here: a box of its block vector, in the
            tensor's block vector.
        others: the same numbers as the part is cut otherwise, in the order of `blocks.others`.
    """

    part: Part
    runs: tuple[Run, ...]
    first_block: int
    num_blocks: int
    first_sum: int = 0
    cut_blocks: int = 0
    boxes: tuple[Box, ...] = ()
    spans: tuple[Span, ...] = ()
    seam: Seam | None = field(default=None, compare=False)
    kept: Span | None = None
    others: tuple[Piece, ...] = ()

    @property
    def num_sums(self) -> int:
        """One per block; one in all for element blocks, only to see that all are finite."""
        return 1 if self.part.elementwise else self.num_blocks

    @property
    def numel(self) -> int:
        """Numbers of the parameter that lie here."""
        return sum(run.numel for run in self.runs)

    def places(self, start: int, stop: int, device: torch.device) -> Tensor:
        """[stop - start] int64: places in the parameter's line; the numbers are of one span."""
        return self.span_of(start).places(start, stop, device)

    def place(self, position: int) -> int:
        """Place in the parameter's line of one number, by its position in the flat line."""
        return self.span_of(position).place(position)

    def span_of(self, position: int) -> Span:
        """Which numbers of the parameter lie around a position in the flat line."""
        return next(span for span in reversed(self.spans) if span.position <= position)


@dataclass(frozen=True)
class Cut:
    """The tensor's share of one axis' all-reduce.

    Attributes:
        axis: over which its block sums are added.
        num_slots: floats it has in the payload, the same on every rank of the axis.
        sums: which of this rank's sums go in,
        slots: and where.
    """

    axis: Axis
    num_slots: int
    sums: Sequence[int]
    slots: Sequence[int]


@dataclass(frozen=True)
class Layout:
    """All pieces of one tensor that the optimizer sees.

    Attributes:
        pieces: in memory order.
        cuts: one per axis over which some of its blocks are cut; none when nothing is.
        spread: axes over which other parts of the tensor lie, cut or not.
        local: tensor as seen (parameter, gradient, line) -> this rank's memory.
        as_state: this rank's block vector -> how it stands in the optimizer's state.
        first: where in the memory the first number of the (first) parameter lies; None: elsewhere.
        flat: the tensor is a slice of a flat buffer: 1-D, and cut without regard to rows. Its
            block vector depends on the sharding.
        moments_by_element: in a state dict the block vector is spread over the elements, for
            loaders that cut state where they cut the tensor.
        others: the parts that are cut in further ways, by these; a layout for each.
    """

    pieces: tuple[Piece, ...]
    cuts: tuple[Cut, ...] = ()
    spread: tuple[Axis, ...] = ()
    local: Callable[[Tensor], Tensor] = itself
    as_state: Callable[[Tensor], Tensor] = itself
    first: int | None = None
    flat: bool = False
    moments_by_element: bool = False
    others: tuple[Layout, ...] = ()

    @property
    def num_blocks(self) -> int:
        """Length of this rank's block vector."""
        return sum(piece.num_blocks for piece in self.pieces)

    @property
    def num_sums(self) -> int:
        """Length of this rank's block sums."""
        return sum(piece.num_sums for piece in self.pieces)

    @property
    def numel(self) -> int:
        """Numbers of parameters that lie here, padding not counted."""
        return sum(piece.numel for piece in self.pieces)
