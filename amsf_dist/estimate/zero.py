"""A step under ZeRO-1 and 2, on paper.

deepspeed/runtime/zero/stage_1_and_2.py (0.19.8), contiguous gradients, one parameter group, no
offload.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from amsf_dist.estimate.buffers import Buffers
from amsf_dist.estimate.ledger import Ledger
from amsf_dist.estimate.moments import BYTES, blocks_of, in_interval
from amsf_dist.estimate.recipe import Recipe
from amsf_dist.estimate.structure import Structure, Weight

__all__ = ["MASTER", "zero"]

MASTER = torch.float32.itemsize
_ALIGNMENT = 2  # numbers a rank: partitions begin at 4 bytes


def zero(structure: Structure, recipe: Recipe, gpus: int, stage: int, buffers: Buffers) -> Ledger:
    """A step on the first or the last rank, whichever holds more.

    The model has `recipe.compute`, the optimizer fp32 weights. One micro-batch a step.

    Args:
        structure: of the model.
        recipe: of the optimizer.
        gpus: ranks.
        stage: 1 or 2.
        buffers: of DeepSpeed.
    """
    ranks = {0, gpus - 1}
    found = [_Rank(structure, recipe, gpus, rank, buffers).step(stage) for rank in ranks]
    return max(found, key=lambda ledger: ledger.fullest.total())


def _backward_order(weights: Sequence[Weight]) -> list[Weight]:
    """The order in which gradients are ready: from behind, embeddings last."""
    behind = weights[::-1]
    return [w for w in behind if not w.looked_up] + [w for w in behind if w.looked_up]


class _Rank:
    """One process."""

    def __init__(
        self, structure: Structure, recipe: Recipe, gpus: int, rank: int, buffers: Buffers
    ) -> None:
        self._size, self._buffers = recipe.compute.itemsize, buffers
        self._weights = structure.weights
        unit = _ALIGNMENT * gpus
        whole = -(-structure.numel // unit) * unit
        self._part = whole // gpus
        start = rank * self._part
        self._mine = list(_overlaps(self._weights, start, start + self._part))
        lines = {owner: line(self._part) for owner, line in recipe.lines.items()}
        parts = blocks_of(structure, recipe)
        if parts is not None:
            counts = (in_interval(parts[at], first, last) for at, first, last in self._mine)
            lines["v"] = BYTES * sum(counts)
        held = {"weights": whole * self._size, "masters": self._part * MASTER, **lines}
        self._ledger = Ledger(held)
        self._inside = {self._weights[at] for at, _, _ in self._mine}
        self._filled = 0  # numbers in the bucket
        self._bucket: list[Weight] = []
        self._gradients = 0

    def step(self, stage: int) -> Ledger:
        """Backward and update."""
        bucket = self._buffers.reduce_bucket * (2 if self._buffers.two_buckets else 1)
        bucket *= self._size
        self._ledger.take("reduced", bucket)
        if stage == 1:  # all gradients first; they are reduced when backward is over
            for weight in self._weights:
                self._ledger.take("reduced", weight.numel * self._size)
            for weight in self._weights:
                self._add(weight)
        else:
            for weight in _backward_order(self._weights):
                self._ledger.take("reduced", weight.numel * self._size)
                self._add(weight)
        self._flush()
        self._ledger.give("reduced", bucket)
        self._update()
        return self._ledger

    def _add(self, weight: Weight) -> None:
        """Move a gradient into the bucket; one that is larger stays where it is."""
        if self._filled + weight.numel > self._buffers.reduce_bucket:
            self._flush()
        if weight.numel <= self._buffers.reduce_bucket:
            self._ledger.give("reduced", weight.numel * self._size)
        self._filled += weight.numel
        self._bucket.append(weight)

    def _flush(self) -> None:
        """Reduce a copy of what is in the bucket; keep what this rank updates, whole weights."""
        copy = self._ledger.take("reduced", self._filled * self._size)
        self._ledger.give("reduced", copy)
        for weight in self._bucket:
            if weight in self._inside and not self._gradients:
                numel = sum(own.numel for own in self._inside)
                self._gradients = self._ledger.take("gradients", numel * self._size)
            if weight.numel > self._buffers.reduce_bucket:
                self._ledger.give("reduced", weight.numel * self._size)
        self._bucket, self._filled = [], 0

    def _update(self) -> None:
        """Flatten the gradients, then make them fp32."""
        flat = self._ledger.take("gradients", self._part * self._size)
        if self._size != MASTER:
            self._ledger.take("gradients", self._part * MASTER)
            self._ledger.give("gradients", flat)
        self._ledger.give("gradients", self._gradients)


def _overlaps(weights: Sequence[Weight], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(index, first, last) of every weight that has numbers in [start, stop) of all of them."""
    before = 0
    for at, weight in enumerate(weights):
        first, last = max(start - before, 0), min(stop - before, weight.numel)
        if first < last:
            yield at, first, last
        before += weight.numel
