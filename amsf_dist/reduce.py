"""The block sums of a step: one buffer, and one all-reduce per process group for the cut blocks.

Which blocks are cut is decided once, from global metadata, so every rank joins the same collectives
with the same number of floats in every step: a rank with an empty shard or a missing gradient sends
zeros and nobody waits for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from amsf_dist.clipping import NEEDS_NORMS
from amsf_dist.collective import Collective, collectives_of, partitions_of
from amsf_dist.kernels import Holding, Kernel
from amsf_dist.shards import Piece, with_own_group

__all__ = ["BlockSums"]

_VERDICTS = torch.tensor(False), torch.tensor(True)


class BlockSums:
    """Sums of squared gradients of every block seen here, for tensors that step together.

    Attributes:
        num_collectives: all-reduces per step.
        num_floats: numbers in all of them together, one of which each tells whether all is finite.
        squares: [holdings] squared norms of the gradients once they are agreed on, for tensors
            whose group clips by them; 0 for others.
        everyone_knows: whether every rank that shares a step sees the same verdict of `agree`, and
            goes by it: nothing is sharded, or a collective runs over every group that shards
            something. Not where groups say `nonfinite="block"`.
    """

    def __init__(self, holdings: Sequence[Holding], own_groups: bool = False) -> None:
        """Plan the buffers and the collectives.

        Args:
            holdings: same parameters in the same order on every rank.
            own_groups: whether to reduce on process groups of our own.
        """
        self._buffers, self._starts = _buffers(holdings)
        self._collectives = collectives_of(holdings, self._buffers, self._starts)
        self._owners = _owners(holdings, self._buffers, self._starts)
        self._num_holdings = len(holdings)
        clipped = [h.group["clip"] in NEEDS_NORMS for h in holdings]
        normed = [i for i, clips in enumerate(clipped) if clips and len(holdings[i].sums)]
        self._device = self._buffers[0].device if self._buffers else torch.device("cpu")
        self._normed = torch.tensor(normed, dtype=torch.int64, device=self._device)
        self._sums = [holdings[index].sums for index in normed]
        self._talks = bool(self._collectives) or any(clipped)
        self._kernels: list[Kernel] = []  # that have measured
        self._doubt: list[Tensor] = []
        self._under_way: tuple[Tensor, dist.Work | None] | None = None
        self.squares = torch.zeros(len(holdings))
        reached = {collective.axis.group.group_name for collective in self._collectives}
        if own_groups:
            for collective in self._collectives:
                collective.axis = with_own_group(collective.axis)
        self.num_collectives = len(self._collectives)
        self.num_floats = sum(collective.num_floats for collective in self._collectives)
        by_block = bool(holdings) and all(h.group["nonfinite"] == "block" for h in holdings)
        self.everyone_knows = not by_block and all(
            axis.group.group_name in reached
            for partition in partitions_of(holdings)
            for axis in partition.layout.spread
        )

    def waiting(self, holding: Holding) -> Collection[int]:
        """Which pieces of a tensor move only when ranks have agreed.

        All do where a gradient that is not finite holds back the whole step, and where norms clip.
        Where blocks decide for themselves, those do that other ranks have a part of: of a block, or
        of a group of numbers with one scale.
        """
        pieces = holding.layout.pieces
        if self.everyone_knows or holding.group["clip"] in NEEDS_NORMS:
            return range(len(pieces))
        shared = () if holding.grouping is None else holding.grouping.shared
        found = {group.piece for group in shared}
        for way, partition in enumerate(holding.partitions):
            cut = sorted(position for cut in partition.layout.cuts for position in cut.sums)
            for number, piece in enumerate(pieces):
                ways = (piece, *piece.others)
                if way < len(ways) and _any_in(cut, ways[way]):
                    found.add(number)
        return found

    def measure(self, kernel: Kernel, later: bool = False) -> None:
        """Add what this rank sees of a kernel's gradients to the sums.

        Args:
            kernel: of tensors that wait, or of others.
            later: they do not wait, and may be measured when they move.
        """
        kernel.measure(later)
        self._kernels.append(kernel)

    def clear(self) -> None:
        """Set every sum to zero."""
        self._kernels.clear()
        for buffer in self._buffers:
            buffer.zero_()

    def send(self) -> None:
        """Start the first all-reduce, with what is measured by now; it runs until `agree`."""
        # 0 when all is finite, NaN otherwise; unlike a flag it can ride in a sum.
        if self._talks:
            self._doubt, self.squares = self._doubt_here(), self._squares_here()
        if self._collectives:
            # where nothing moves meanwhile, a GPU's stream goes on with it without another's events
            self._under_way = self._start(self._collectives[0], apart=not self.everyone_knows)

    def agree(self) -> dict[torch.device, Tensor]:
        """Add up the cut blocks over their ranks; after `send`.

        Returns:
            For every device that holds parameters a 0-dim bool: whether every gradient seen here,
            and by the ranks reached, is finite.
        """
        if not self._talks:  # nothing to agree on; gradient release comes here for every module
            return self.finite_here()
        for collective in self._collectives:
            payload, work = self._under_way or self._start(collective)
            self._under_way, numel = None, collective.numel
            if work is not None:
                work.wait()
            collective.scatter(payload, self._buffers)
            self.squares.index_copy_(0, collective.squares, payload[numel:-1].to(self._device))
            for number in self._doubt:
                number.copy_(payload[-1])
        doubt = self._doubt
        if not self.everyone_knows:  # other tensors were measured meanwhile
            doubt = [sent + here for sent, here in zip(doubt, self._doubt_here(), strict=True)]
        return _no_doubt(doubt)

    def shrink(self, factors: Tensor) -> None:
        """Make every sum that of gradients that are so much smaller.

        Args:
            factors: [holdings] fp64, of the gradients.
        """
        for buffer, owners in zip(self._buffers, self._owners, strict=True):
            own = factors.to(buffer).square()
            buffer.mul_(own.index_select(0, owners))

    def finite_here(self) -> dict[torch.device, Tensor]:
        """For every device a 0-dim bool: whether what this rank has measured by now is finite."""
        known = [kernel.finite for kernel in self._kernels]
        if len(self._buffers) == 1 and known and None not in known:
            # A kernel has looked at its sums. An operation of torch takes as long as thousands of
            # numbers, after a step has gone through all caches.
            return {self._buffers[0].device: _VERDICTS[all(known)]}
        return _no_doubt(self._doubt_here())

    def _start(
        self, collective: Collective, apart: bool = False
    ) -> tuple[Tensor, dist.Work | None]:
        """Its payload, and the all-reduce of it where that is to run apart from what follows."""
        payload, numel = collective.gather(self._buffers, self.squares.dtype), collective.numel
        payload[:numel] /= collective.replicas
        here = self.squares.index_select(0, collective.squares)
        payload[numel:-1] = here.to(payload.device) / collective.axis.replicas
        payload[-1:] = _sum_on(payload.device, self._doubt)
        work = dist.all_reduce(payload, group=collective.axis.group, async_op=apart)
        return payload, work

    def _doubt_here(self) -> list[Tensor]:
        """Per buffer 0 where all of it is finite, else NaN."""
        return [_largest(buffer) * 0.0 for buffer in self._buffers]

    def _squares_here(self) -> Tensor:
        """[holdings] squared norms of what this rank has of the gradients, fp32 or fp64."""
        fp64 = any(buffer.dtype == torch.float64 for buffer in self._buffers)
        dtype = torch.float64 if fp64 else torch.float32
        squares = torch.zeros(self._num_holdings, dtype=dtype, device=self._device)
        if self._sums:
            # No sum is negative. Adding by index would do the same in an order that changes on a
            # GPU, and replicas would clip by factors that differ.
            norms = torch._foreach_norm(self._sums, 1)
            here = torch.stack([norm.to(self._device, dtype) for norm in norms])
            squares.index_copy_(0, self._normed, here)
        return squares


def _owners(
    holdings: Sequence[Holding], buffers: Sequence[Tensor], starts: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Which tensor every sum belongs to; nothing where no norm clips any."""
    if not any(holding.group["clip"] in NEEDS_NORMS for holding in holdings):
        return []
    owners = [torch.empty(len(buffer), dtype=torch.int64) for buffer in buffers]
    places = iter(starts)
    for index, holding in enumerate(holdings):
        for partition in holding.partitions:
            number, start = next(places)
            owners[number][start : start + partition.layout.num_sums] = index
    return [own.to(buffer.device) for own, buffer in zip(owners, buffers, strict=True)]


def _any_in(positions: Sequence[int], piece: Piece) -> bool:
    """Whether any of these positions in the tensor's sums, in order, is one of a piece's."""
    at = bisect_left(positions, piece.first_sum)
    return at < len(positions) and positions[at] < piece.first_sum + piece.num_sums


def _largest(sums: Tensor) -> Tensor:
    """0-dim. No sum is negative, so that of all of them it is finite only if every one is."""
    return sums.amax() if len(sums) else sums.new_zeros(())


def _no_doubt(doubt: Sequence[Tensor]) -> dict[torch.device, Tensor]:
    if len(doubt) == 1:
        return {doubt[0].device: doubt[0].isfinite()}
    return {number.device: _sum_on(number.device, doubt).isfinite() for number in doubt}


def _sum_on(device: torch.device, numbers: Sequence[Tensor]) -> Tensor:
    return torch.stack([number.to(device, torch.float64) for number in numbers]).sum()


def _buffers(holdings: Sequence[Holding]) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """One buffer per device and dtype; every partition's `sums` becomes a view of its part.

    Returns:
        The buffers, and for every partition (which buffer, where its part begins).
    """
    partitions = partitions_of(holdings)
    keys = [
        (partition.moments.device, holding.compute_dtype)
        for holding in holdings
        for partition in holding.partitions
    ]
    alike = list(dict.fromkeys(keys))
    sizes = [0] * len(alike)
    starts = []
    for partition, key in zip(partitions, keys, strict=True):
        number = alike.index(key)
        starts.append((number, sizes[number]))
        sizes[number] += partition.layout.num_sums
    buffers = [
        torch.zeros(size, device=device, dtype=dtype)
        for size, (device, dtype) in zip(sizes, alike, strict=True)
    ]
    for partition, (number, start) in zip(partitions, starts, strict=True):
        partition.sums = buffers[number][start : start + partition.layout.num_sums]
    return buffers, starts
