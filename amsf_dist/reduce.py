"""The block sums of a step: one buffer, and one all-reduce per process group for the cut blocks.

Which blocks are cut is decided once, from global metadata, so every rank joins the same collectives
with the same number of floats in every step: a rank with an empty shard or a missing gradient sends
zeros and nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from amsf_dist.kernels import Holding
from amsf_dist.shards import Axis

__all__ = ["BlockSums"]


class BlockSums:
    """Sums of squared gradients of every block seen here, for tensors that step together.

    Attributes:
        num_collectives: all-reduces per step.
        num_floats: numbers in all of them together, one of which tells whether all is finite.
        everyone_knows: whether every rank that shares a step sees the same verdict of `finite`:
            nothing is sharded, or a collective runs over every group that shards something.
    """

    def __init__(self, holdings: Sequence[Holding]) -> None:
        """Plan the buffer and the collectives.

        Args:
            holdings: same parameters in the same order on every rank.
        """
        self._buffers = _buffers(holdings)
        self._cut: dict[str, tuple[Axis, list[Holding]]] = {}
        for holding in holdings:
            for axis in holding.layout.axes:
                key = axis.group.group_name
                self._cut.setdefault(key, (axis, []))[1].append(holding)
        self.num_collectives = len(self._cut)
        self.num_floats = sum(
            1 + sum(holding.num_sums for holding in cut) for _, cut in self._cut.values()
        )
        self.everyone_knows = all(
            axis.group.group_name in self._cut
            for holding in holdings
            for axis in holding.layout.spread
        )

    def clear(self) -> None:
        """Set every sum to zero."""
        for buffer in self._buffers:
            buffer.zero_()

    def agree(self) -> dict[torch.device, Tensor]:
        """Add up the cut blocks over their ranks.

        Returns:
            For every device that holds parameters a 0-dim bool: whether every gradient seen here,
            and by the ranks reached, is finite.
        """
        # 0 when all is finite, NaN otherwise; unlike a flag it can ride in a sum.
        doubt = [(buffer * 0.0).sum() for buffer in self._buffers]
        for axis, cut in self._cut.values():
            dtype = torch.float64 if any(d.dtype == torch.float64 for d in doubt) else torch.float32
            device = torch.device(axis.device_type)
            ours = _sum_on(device, doubt).to(dtype).view(1)
            payload = torch.cat([*(h.sums.to(device, dtype) for h in cut), ours])
            dist.all_reduce(payload, group=axis.group)
            totals = torch.split(payload[:-1], [h.num_sums for h in cut])
            for holding, total in zip(cut, totals, strict=True):
                holding.sums.copy_(total)
            doubt = [d.copy_(payload[-1]) for d in doubt]
        return {d.device: _sum_on(d.device, doubt).isfinite() for d in doubt}


def _sum_on(device: torch.device, numbers: Sequence[Tensor]) -> Tensor:
    return torch.stack([number.to(device, torch.float64) for number in numbers]).sum()


def _buffers(holdings: Sequence[Holding]) -> list[Tensor]:
    """One buffer per device and dtype; every holding's `sums` becomes a view of its part."""
    alike: dict[tuple[torch.device, torch.dtype], list[Holding]] = {}
    for holding in holdings:
        key = (holding.exp_avg_sq.device, holding.compute_dtype)
        alike.setdefault(key, []).append(holding)
    buffers = []
    for (device, dtype), members in alike.items():
        sizes = [holding.num_sums for holding in members]
        buffer = torch.zeros(sum(sizes), device=device, dtype=dtype)
        for holding, sums in zip(members, torch.split(buffer, sizes), strict=True):
            holding.sums = sums
        buffers.append(buffer)
    return buffers
