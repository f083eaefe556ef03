"""Which block sums go where in an all-reduce: planned once, from the shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amsf_dist.clipping import NEEDS_NORMS
from amsf_dist.kernels import Holding, Partition
from amsf_dist.shards import Axis

__all__ = ["Collective", "collectives_of", "partitions_of"]


@dataclass
class Collective:
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


def partitions_of(holdings: Sequence[Holding]) -> list[Partition]:
    """All ways in which these tensors are cut, in order."""
    return [partition for holding in holdings for partition in holding.partitions]


def collectives_of(
    holdings: Sequence[Holding], buffers: Sequence[Tensor], starts: Sequence[tuple[int, int]]
) -> list[Collective]:
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
        Collective(
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
            torch.tensor(squares.get(name, []), dtype=torch.int64, device=buffers[0].device),
        )
        for name, axis in axes.items()
    ]
