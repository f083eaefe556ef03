"""Block sums without rounding: the same bits for any number of ranks (`deterministic=True`).

A floating-point sum depends on the order of its terms, so it depends on where a block is cut. An
integer sum does not. Every block agrees on its largest square first (a maximum does not depend on
order either), which fixes a scale, a power of two; squares are rounded to whole multiples of it one
by one, and added as 64-bit integers. The scale leaves room for as many terms as the block has, so
nothing overflows, and a row of 4,096 numbers is summed to 41 bits: closer than fp32.

The price is a second pass over the gradients and a second all-reduce.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from amsf_dist import kernels
from amsf_dist.collective import partitions_of
from amsf_dist.kernels import Holding, Kernel
from amsf_dist.reduce import BlockSums

__all__ = ["ExactBlockSums"]

_INTEGER_BITS = 61  # of 63: a square may be rounded up, and so may the largest one's exponent
_REPLICA_BITS = 8  # kept free for up to 256 replicas (HSDP), which all send the same sums


class ExactBlockSums(BlockSums):
    """`BlockSums` whose result does not depend on the sharding, to the bit."""

    def __init__(self, holdings: Sequence[Holding], own_groups: bool = False) -> None:
        """Plan; see `BlockSums`."""
        super().__init__(holdings, own_groups)
        self.num_collectives *= 2
        self.num_floats *= 2
        self._measured: list[Holding] = []
        self._integers = [torch.zeros_like(b, dtype=torch.int64) for b in self._buffers]
        self._bits = [torch.zeros_like(b, dtype=torch.int32) for b in self._buffers]
        self._places: dict[int, tuple[int, slice]] = {}
        for partition, (number, start) in zip(partitions_of(holdings), self._starts, strict=True):
            layout = partition.layout
            self._places[id(partition)] = number, slice(start, start + layout.num_sums)
            most = max((cut.axis.replicas for cut in layout.cuts), default=1)
            for piece in layout.pieces:
                terms = (piece.part.blocks.block_numel - 1).bit_length()
                first = start + piece.first_sum
                bits = self._bits[number][first : first + piece.num_sums]
                bits.fill_(_INTEGER_BITS - terms - max(_REPLICA_BITS, (most - 1).bit_length()))

    def waiting(self, holding: Holding) -> Collection[int]:
        """Sums are not those of the kernels: everything does."""
        return range(len(holding.layout.pieces))

    def clear(self) -> None:
        """Set every sum to zero."""
        super().clear()
        self._measured.clear()
        for integers in self._integers:
            integers.zero_()

    def measure(self, kernel: Kernel, later: bool = False) -> None:
        """Find the largest square of every block; the squares are added when all know it."""
        for holding in kernel.holdings:
            if holding.param.grad is not None:
                for partition in holding.partitions:
                    kernels.largest_square(holding, partition)
                self._measured.append(holding)

    def send(self) -> None:
        """Nothing can be sent before the largest squares are known to all."""

    def agree(self) -> dict[torch.device, Tensor]:
        """Agree on the largest squares, then on the sums; see `BlockSums.agree`."""
        peaks = self._buffers
        for peak in peaks:  # a maximum may lose NaN, but not infinity
            peak.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        worst = [peak.max() if peak.numel() else peak.new_zeros(()) for peak in peaks]
        for collective in self._collectives:
            payload = collective.gather(peaks, torch.float64)
            payload[-1:] = torch.stack([w.to(payload) for w in worst]).max()
            dist.all_reduce(payload, op=dist.ReduceOp.MAX, group=collective.axis.group)
            collective.scatter(payload, peaks)
            worst = [w.copy_(payload[-1]) for w in worst]

        scales = [_scale(peak, bits) for peak, bits in zip(peaks, self._bits, strict=True)]
        for holding in self._measured:
            for partition in holding.partitions:
                number, here = self._places[id(partition)]
                scale, integers = scales[number][here], self._integers[number][here]
                kernels.add_scaled_squares(holding, partition, scale, integers)
        for collective in self._collectives:
            payload = collective.gather(self._integers, torch.int64)
            dist.all_reduce(payload, group=collective.axis.group)
            payload[:-1] //= collective.replicas
            collective.scatter(payload, self._integers)
        for peak, integers, scale in zip(peaks, self._integers, scales, strict=True):
            bad = ~peak.isfinite()
            peak.copy_((integers / scale).masked_fill_(bad, torch.nan))
        return {
            w.device: torch.stack([other.to(w.device, torch.float64) for other in worst])
            .max()
            .isfinite()
            for w in worst
        }


def _scale(peak: Tensor, bits: Tensor) -> Tensor:
    """[num_sums] fp64 powers of two that bring the largest square to `bits` bits."""
    _, exponent = torch.frexp(torch.where(peak.isfinite(), peak, 1.0))
    return torch.ldexp(
        torch.ones_like(peak, dtype=torch.float64), (bits - exponent).clamp(max=1000)
    )
