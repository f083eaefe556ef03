"""The peaks of a step: what ranks that share a group of numbers must know to store it alike.

Lines in groups (storage/grouped.py) are stored with the scale of a group's largest number. Where a
shard boundary cuts a group, its ranks agree on that number by one more all-reduce, of one float per
cut group. Where none is cut, and for every other storage, there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from amsf_dist.kernels import Holding, Move, NativeMove
from amsf_dist.shards import Axis, with_own_group

__all__ = ["GroupPeaks"]


@dataclass
class _Collective:
    """Groups that the same ranks share.

    Attributes:
        axes: one all-reduce each, one after another.
        numel: floats in it.
        takes: per buffer (positions in the buffer, positions in the payload), int64.
    """

    axes: tuple[Axis, ...]
    numel: int
    takes: list[tuple[Tensor, Tensor]]


class GroupPeaks:
    """Largest magnitudes of groups that do not lie in one tile, for tensors that step together.

    Attributes:
        num_collectives: all-reduces per step.
        num_floats: numbers in all of them together.
    """

    def __init__(self, holdings: Sequence[Holding], own_groups: bool = False) -> None:
        """Plan the buffers and the collectives.

        Args:
            holdings: same parameters in the same order on every rank.
            own_groups: whether to reduce on process groups of our own.
        """
        self._holdings = [h for h in holdings if h.grouping is not None]
        devices = list(dict.fromkeys(h.exp_avg_sq.device for h in self._holdings))
        sizes = dict.fromkeys(devices, 0)
        starts: list[int] = []
        for holding in self._holdings:
            starts.append(sizes[holding.exp_avg_sq.device])
            sizes[holding.exp_avg_sq.device] += len(holding.lines) * _width(holding)
        self._buffers = [torch.zeros(size, device=device) for device, size in sizes.items()]
        for holding, start in zip(self._holdings, starts, strict=True):
            lines, width = len(holding.lines), _width(holding)
            buffer = self._buffers[devices.index(holding.exp_avg_sq.device)]
            holding.peaks = buffer[start : start + lines * width].view(lines, width)
        self._collectives = _collectives(self._holdings, starts, devices)
        if own_groups:
            for collective in self._collectives:
                collective.axes = tuple(map(with_own_group, collective.axes))
        self.num_collectives = sum(len(c.axes) for c in self._collectives)
        self.num_floats = sum(len(c.axes) * c.numel for c in self._collectives)

    def agree(self, moves: Iterable[Move | NativeMove]) -> None:
        """Find the peaks here, and those of groups that other ranks have parts of.

        Every rank calls it in every step, with moves or without.
        """
        if not self._holdings:
            return
        for buffer in self._buffers:
            buffer.zero_()
        for move in moves:
            move.seek_peaks()
        for collective in self._collectives:
            device = torch.device(collective.axes[0].device_type)
            payload = torch.zeros(collective.numel, device=device)
            for buffer, (places, slots) in zip(self._buffers, collective.takes, strict=True):
                payload.index_copy_(0, slots, buffer.index_select(0, places).to(device))
            for axis in collective.axes:
                dist.all_reduce(payload, op=dist.ReduceOp.MAX, group=axis.group)
            for buffer, (places, slots) in zip(self._buffers, collective.takes, strict=True):
                buffer.index_copy_(0, places, payload.index_select(0, slots).to(buffer))


def _width(holding: Holding) -> int:
    """Peaks of one line: of the shared groups, and a zero for all others."""
    assert holding.grouping is not None
    return len(holding.grouping.shared) + 1


def _collectives(
    holdings: Sequence[Holding], starts: Sequence[int], devices: Sequence[torch.device]
) -> list[_Collective]:
    axes: dict[tuple[str, ...], tuple[Axis, ...]] = {}
    numel: dict[tuple[str, ...], int] = {}
    takes: dict[tuple[str, ...], list[tuple[list[int], list[int]]]] = {}
    for holding, start in zip(holdings, starts, strict=True):
        number = devices.index(holding.exp_avg_sq.device)
        for at, piece in enumerate(holding.layout.pieces):
            if piece.seam is None:
                continue
            name = tuple(axis.group.group_name for axis in piece.seam.axes)
            if name not in axes:
                axes[name], numel[name] = piece.seam.axes, 0
                takes[name] = [([], []) for _ in devices]
            places, slots = takes[name][number]
            for line in range(len(holding.lines)):
                assert holding.grouping is not None
                for index, group in enumerate(holding.grouping.shared):
                    if group.piece == at and group.slot is not None:
                        places.append(start + line * _width(holding) + index)
                        slots.append(numel[name] + group.slot)
                numel[name] += piece.seam.num_slots
    return [
        _Collective(
            axes[name],
            numel[name],
            [
                (
                    torch.tensor(places, dtype=torch.int64, device=device),
                    torch.tensor(slots, dtype=torch.int64, device=axes[name][0].device_type),
                )
                for device, (places, slots) in zip(devices, takes[name], strict=True)
            ],
        )
        for name in axes
    ]
