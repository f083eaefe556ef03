"""One optimizer-visible tensor as a kernel needs it: its memory, its blocks, its storages."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from amsf_dist.kernels.grouping import Grouping
from amsf_dist.kernels.tiles import Tile, tiles
from amsf_dist.rules import Rule
from amsf_dist.shards import Layout, Piece
from amsf_dist.storage import Storage

__all__ = ["WEIGHT", "Holding", "Line", "Partition"]

WEIGHT = "weight"
"""What a weight storage's keys are made of; the first of them is the parameter itself."""


@dataclass(frozen=True)
class Line:
    """One of the rule's state lines: its storage, and this rank's memory of it."""

    storage: Storage
    tensors: tuple[Tensor, ...]

    @property
    def by_number(self) -> tuple[Tensor, ...]:
        """Those that are laid out as the parameter."""
        return self.tensors[:1] if self.storage.group else self.tensors

    @property
    def by_group(self) -> tuple[Tensor, ...]:
        """Those with an entry per group."""
        return self.tensors[1:] if self.storage.group else ()


@dataclass(eq=False)
class Partition:
    """One way to cut a tensor in blocks, measured and agreed like any other.

    Attributes:
        key: of its block moments in the state.
        layout: where its blocks lie.
        moments: [layout.num_blocks] second moments of the blocks here, a view of the state.
        sums: [layout.num_sums] view of the step's block sums.
    """

    key: str
    layout: Layout
    moments: Tensor
    sums: Tensor = field(init=False)


@dataclass
class Holding:
    """What this rank holds of one tensor, and the state beside it.

    Attributes:
        param: as the optimizer was given it.
        name: canonical, "" when unknown.
        partitions: how it is cut in blocks; the first says where its numbers lie.
        rule: the group's update rule.
        weight_storage: how its weights are kept.
        errors: this rank's memory of what that storage keeps beside the parameter.
        lines: the rule's lines, in the rule's order.
        group: its parameter group, live.
        index: its place in the group's counters.
        grouping: where its lines lie in groups; None where no storage of theirs has any.
        factors: [group's parameters] fp64, of the gradients in this step; None: 1.
        peaks: [lines, shared groups + 1] view of the step's peaks; the last one is always 0.
        prepared: what the kernel that steps it worked out once and for all.
    """

    param: Tensor
    name: str
    partitions: tuple[Partition, ...]
    rule: Rule
    weight_storage: Storage
    errors: tuple[Tensor, ...]
    lines: tuple[Line, ...]
    group: Mapping[str, Any]
    index: int
    grouping: Grouping | None = None
    factors: Tensor | None = None
    peaks: Tensor = field(init=False)
    prepared: Any = field(init=False, default=None, repr=False, compare=False)

    @property
    def layout(self) -> Layout:
        """Where its numbers lie, and the first partition's blocks."""
        return self.partitions[0].layout

    @property
    def factor(self) -> Tensor | None:
        """0-dim, of this gradient."""
        factors = self.factors
        return None if factors is None else factors[self.index].to(self.compute_dtype)

    @property
    def exp_avg_sq(self) -> Tensor:
        """[num_blocks] second moments of the first partition's blocks here."""
        return self.partitions[0].moments

    @property
    def sums(self) -> Tensor:
        """[num_sums] the step's sums of the first partition's blocks here."""
        return self.partitions[0].sums

    @property
    def compute_dtype(self) -> torch.dtype:
        """fp32; fp64 for fp64 parameters."""
        return torch.promote_types(self.param.dtype, torch.float32)

    @property
    def tiled(self) -> Iterator[tuple[Piece, Iterable[Tile]]]:
        """Every piece, and the tiles in which kernels walk over its lines."""
        for number, piece in enumerate(self.layout.pieces):
            if self.grouping is None:
                yield piece, tiles(piece, self.exp_avg_sq.device)
            else:
                yield piece, self.grouping.tiles[number]

    @property
    def gradient(self) -> Tensor:
        """This rank's memory of the gradient."""
        grad = self.param.grad
        assert grad is not None
        return self.memory(grad)

    @property
    def error_keys(self) -> tuple[str, ...]:
        """Names in the state of what the weight storage keeps beside the parameter."""
        return self.weight_storage.keys(WEIGHT)[1:]

    @property
    def weight(self) -> tuple[Tensor, ...]:
        """This rank's memory of the weights, in the order of their storage's keys."""
        return self.memory(self.param), *self.errors

    def only(self, numbers: Collection[int]) -> list[Holding]:
        """The tensor as if these were all of its pieces, for a kernel; nothing if there are none.

        Args:
            numbers: of the pieces; either all that have a part of a shared group, or none of them.
        """
        pieces = self.layout.pieces
        kept = [number for number in range(len(pieces)) if number in numbers]
        if not kept:
            return []
        if len(kept) == len(pieces):
            return [self]
        whole = self.partitions[0]
        layout = replace(whole.layout, pieces=tuple(pieces[number] for number in kept))
        first = Partition(whole.key, layout, whole.moments)
        first.sums = whole.sums
        grouping = None if self.grouping is None else self.grouping.only(kept)
        part = replace(self, partitions=(first, *self.partitions[1:]), grouping=grouping)
        if grouping is not None:
            part.peaks = self.peaks
        return [part]

    def memory(self, tensor: Tensor) -> Tensor:
        """This rank's memory of a tensor shaped and sharded as the parameter."""
        return self.layout.local(tensor).detach()  # detach() of a DTensor takes 50 us
