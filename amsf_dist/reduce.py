"""The block sums of a step: one buffer, and one all-reduce per process group for the cut blocks.

Which blocks are cut is decided once, from global metadata, so every rank joins the same collectives
with the same number of floats in every step: a rank with an empty shard or a missing gradient sends
zeros and nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from amsf_dist.clipping import NEEDS_NORMS
from amsf_dist.kernels import Holding, Kernel, Partition
from amsf_dist.shards import Axis, with_own_group

__all__ = ["BlockSums", "partitions_of"]


@dataclass
class _Collective:
    """One all-reduce: which sums go where in its payload.

    Attributes:
        axis: the ranks.
        numel: floats, without the one that tells whether all is finite.
        takes: per buffer (positions in the buffer, positions in the payload), int64.
        replicas: [numel] how many ranks send the same sum.
        squares: which tensors' squared norms are sent behind the sums, int64.
    """

    axis: Axis
    numel: int
    takes: list[tuple[Tensor, Tensor]]
    replicas: Tensor
    squares: Tensor

    @property
    def num_floats(self) -> int:
        """Numbers in the payload."""
        return self.numel + len(self.squares) + 1

    def gather(self, buffers: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """[num_floats] payload with this rank's sums in it, zero elsewhere."""
        device = torch.device(self.axis.device_type)
        payload = torch.zeros(self.num_floats, dtype=dtype, device=device)
        for buffer, (places, slots) in zip(buffers, self.takes, strict=True):
            payload.index_copy_(0, slots, buffer.index_select(0, places).to(device, dtype))
        return payload

    def scatter(self, payload: Tensor, buffers: Sequence[Tensor]) -> None:
        """Write the reduced sums back."""
        for buffer, (places, slots) in zip(buffers, self.takes, strict=True):
            buffer.index_copy_(0, places, payload.index_select(0, slots).to(buffer))


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
        self._collectives = _collectives(holdings, self._buffers, self._starts)
        self._owners = _owners(holdings, self._buffers, self._starts)
        self._num_holdings = len(holdings)
        self._kernels: list[Kernel] = []  # that have measured
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

    @property
    def nobody_waits(self) -> bool:
        """Whether every block decides for itself, and no rank has sums that another one needs."""
        return not self.everyone_knows and not self.num_collectives

    def measure(self, kernel: Kernel) -> None:
        """Add what this rank sees of a kernel's gradients to the sums."""
        kernel.measure(self.nobody_waits)
        self._kernels.append(kernel)

    def clear(self) -> None:
        """Set every sum to zero."""
        self._kernels.clear()
        for buffer in self._buffers:
            buffer.zero_()

    def agree(self) -> dict[torch.device, Tensor]:
        """Add up the cut blocks over their ranks.

        Returns:
            For every device that holds parameters a 0-dim bool: whether every gradient seen here,
            and by the ranks reached, is finite.
        """
        alone = len(self._buffers) == 1 and self._owners == [None] and not self._collectives
        known = [kernel.finite for kernel in self._kernels]
        if alone and known and None not in known:
            # A kernel has looked at its sums. An operation of torch takes as long as thousands of
            # numbers, after a step has gone through all caches.
            return {self._buffers[0].device: _VERDICTS[all(known)]}
        # 0 when all is finite, NaN otherwise; unlike a flag it can ride in a sum.
        doubt = [_largest(buffer) * 0.0 for buffer in self._buffers]
        if alone:  # nothing to agree on; gradient release comes here for every module
            return {doubt[0].device: doubt[0].isfinite()}
        dtype = torch.float32
        if any(buffer.dtype == torch.float64 for buffer in self._buffers):
            dtype = torch.float64
        squares = self._squares_here(dtype)
        for collective in self._collectives:
            payload, numel = collective.gather(self._buffers, dtype), collective.numel
            payload[:numel] /= collective.replicas
            here = squares.index_select(0, collective.squares.to(squares.device))
            payload[numel:-1] = here.to(payload.device) / collective.axis.replicas
            payload[-1:] = _sum_on(payload.device, doubt)
            dist.all_reduce(payload, group=collective.axis.group)
            collective.scatter(payload, self._buffers)
            squares[collective.squares] = payload[numel:-1].to(squares.device)
            doubt = [number.copy_(payload[-1]) for number in doubt]
        self.squares = squares[:-1]
        return {number.device: _sum_on(number.device, doubt).isfinite() for number in doubt}

    def _squares_here(self, dtype: torch.dtype) -> Tensor:
        """[holdings + 1] squared norms of what this rank has of the gradients."""
        device = self._buffers[0].device if self._buffers else torch.device("cpu")
        squares = torch.zeros(self._num_holdings + 1, dtype=dtype, device=device)
        for buffer, owners in zip(self._buffers, self._owners, strict=True):
            if owners is not None:
                squares.index_add_(0, owners, buffer.to(device, dtype))
        return squares


def _owners(
    holdings: Sequence[Holding], buffers: Sequence[Tensor], starts: Sequence[tuple[int, int]]
) -> list[Tensor | None]:
    """Which tensor's norm every sum belongs to; the last number: to none. None: none is needed."""
    if not any(holding.group["clip"] in NEEDS_NORMS for holding in holdings):
        return [None for _ in buffers]
    owners = [torch.full((len(buffer),), len(holdings)) for buffer in buffers]
    places = iter(starts)
    for index, holding in enumerate(holdings):
        for partition in holding.partitions:
            number, start = next(places)
            if partition is holding.partitions[0] and holding.group["clip"] in NEEDS_NORMS:
                owners[number][start : start + partition.layout.num_sums] = index
    device = buffers[0].device if buffers else torch.device("cpu")
    return [owner.to(device) for owner in owners]


def partitions_of(holdings: Sequence[Holding]) -> list[Partition]:
    """All ways in which these tensors are cut, in order."""
    return [partition for holding in holdings for partition in holding.partitions]


def _collectives(
    holdings: Sequence[Holding], buffers: Sequence[Tensor], starts: Sequence[tuple[int, int]]
) -> list[_Collective]:
    """One per process group in which something is cut, in the order of the parameters."""
    axes: dict[str, Axis] = {}
    numel: dict[str, int] = {}
    takes: dict[str, list[tuple[list[int], list[int]]]] = {}
    replicas: dict[str, list[int]] = {}
    squares: dict[str, list[int]] = {}
    for index, holding in enumerate(holdings):
        if holding.group["clip"] in NEEDS_NORMS:  # norms cross what shards, cut or not
            for axis in holding.layout.spread:
                squares.setdefault(axis.group.group_name, []).append(index)
                axes.setdefault(axis.group.group_name, axis)
    for name in axes:
        numel[name], replicas[name], takes[name] = 0, [], [([], []) for _ in buffers]
    for partition, (number, start) in zip(partitions_of(holdings), starts, strict=True):
        for cut in partition.layout.cuts:
            name = cut.axis.group.group_name
            if name not in axes:
                axes[name], numel[name], replicas[name] = cut.axis, 0, []
                takes[name] = [([], []) for _ in buffers]
            places, slots = takes[name][number]
            places.extend(start + index for index in cut.sums)
            slots.extend(numel[name] + slot for slot in cut.slots)
            replicas[name].extend([cut.axis.replicas] * cut.num_slots)
            numel[name] += cut.num_slots
    return [
        _Collective(
            axis,
            numel[name],
            [
                (
                    torch.tensor(places, dtype=torch.int64, device=buffer.device),
                    torch.tensor(slots, dtype=torch.int64, device=axis.device_type),
                )
                for buffer, (places, slots) in zip(buffers, takes[name], strict=True)
            ],
            torch.tensor(replicas[name], dtype=torch.int64, device=axis.device_type),
            torch.tensor(squares.get(name, []), dtype=torch.int64),
        )
        for name, axis in axes.items()
    ]


def _largest(sums: Tensor) -> Tensor:
    """0-dim. No sum is negative, so that of all of them it is finite only if every one is."""
    return sums.amax() if len(sums) else sums.new_zeros(())


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
