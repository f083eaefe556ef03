"""A step under `fully_shard`, on paper: what torch gathers, reduces and frees, in its order.

torch/distributed/fsdp/_fully_shard (2.13), without streams: what they hold longer on a GPU, they
hold through the references followed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from amsf_dist.estimate.ledger import Ledger
from amsf_dist.estimate.moments import BYTES, blocks_of, in_mesh
from amsf_dist.estimate.recipe import Recipe
from amsf_dist.estimate.structure import Structure, Weight

__all__ = ["fsdp2"]

REDUCE = torch.float32
"""Dtype of reductions where weights or arithmetic have 16 bits, as the training job sets it."""


@dataclass(frozen=True)
class _Unit:
    """Bytes per element do not belong here: everything is counted in numbers.

    Attributes:
        local: numbers on a rank, padding included.
        full: numbers of the gathered weights, padding included.
        early: numbers whose gradient is ready when backward has come here.
        late: numbers of embeddings, whose gradient is ready at the very end.
        twice: of those, numbers whose gradient has an earlier part too (tied weights).
    """

    local: int
    full: int
    early: int
    late: int
    twice: int

    @property
    def only_late(self) -> bool:
        """Its inputs are token ids: it is reduced when backward is over."""
        return self.late > 0 and not self.early


def fsdp2(structure: Structure, recipe: Recipe, gpus: int, replicas: int = 1) -> Ledger:
    """A step on the first rank.

    Every unit of the structure is a `fully_shard` module of its own, and so is the model. Weights
    that are stored in more bits than `recipe.compute` are gathered in the latter
    (`MixedPrecisionPolicy(param_dtype=...)`). One micro-batch a step, gradients set to None after
    it, no activations.

    Args:
        structure: of the model.
        recipe: of the optimizer.
        gpus: ranks in all.
        replicas: groups of ranks of which each holds all shards (HSDP).
    """
    shards = gpus // replicas
    held = [rows_here(weight, shards) for weight in structure.weights]
    lines = {owner: sum(map(line, held)) for owner, line in recipe.lines.items()}
    parts = blocks_of(structure, recipe)
    if parts is not None:
        lines["v"] = BYTES * sum(in_mesh(part, replicas, shards) for part in parts)
    ledger = Ledger({"weights": sum(held) * recipe.stored.itemsize, **lines})
    _Step(ledger, recipe, shards, replicas > 1).run(
        _unit(structure.root, shards), [_unit(unit, shards) for unit in structure.units]
    )
    return ledger


def rows_here(weight: Weight, shards: int) -> int:
    """Numbers on the first rank: as many rows as on any, and other ranks are padded to it."""
    return -(-weight.rows // shards) * (weight.numel // max(weight.rows, 1))


def _unit(weights: Sequence[Weight], shards: int) -> _Unit:
    local = sum(rows_here(weight, shards) for weight in weights)
    late = [weight for weight in weights if weight.looked_up]
    return _Unit(
        local=local,
        full=local * shards,
        early=sum(weight.numel for weight in weights if not weight.looked_up),
        late=sum(weight.numel for weight in late),
        twice=sum(weight.numel for weight in late if weight.uses > 1),
    )


class _Step:
    """Forward, backward and the end of it."""

    def __init__(self, ledger: Ledger, recipe: Recipe, shards: int, replicated: bool) -> None:
        self._ledger, self._shards, self._replicated = ledger, shards, replicated
        self._stored = recipe.stored.itemsize
        self._compute = min(recipe.stored.itemsize, recipe.compute.itemsize)
        low = recipe.compute.itemsize < REDUCE.itemsize
        self._reduce = REDUCE.itemsize if low else self._stored
        self._casts = self._compute != self._stored
        self._release = recipe.release
        self._sent = 0  # input of the last reduce-scatter, kept until the next one
        self._summed = 0  # what was all-reduced over replicas, kept until backward is over

    def run(self, root: _Unit, units: Sequence[_Unit]) -> None:
        """The root's weights are gathered first and stay for the backward pass."""
        before = 0
        for unit in (root, *units):
            output = self._gather(unit)
            self._free("gathered", before)  # kept until the next gather has come
            self._take("gathered", unit.full * self._compute)
            before = output
            if unit is not root:
                self._free("gathered", unit.full * self._compute)
        self._free("gathered", before)
        self._backward(root, units)

    def _backward(self, root: _Unit, units: Sequence[_Unit]) -> None:
        left_over: list[_Unit] = []
        self._gradients(root.early + root.twice)
        ahead = self._gather(units[-1]) if units else 0
        for index, unit in reversed(list(enumerate(units))):
            self._take("gathered", unit.full * self._compute)
            self._free("gathered", ahead)
            ahead = self._gather(units[index - 1]) if index else 0
            self._gradients(unit.early + unit.twice)
            if unit.only_late:
                left_over.append(unit)
            else:
                self._look_ups(unit)
                self._reduce_unit(unit)
        for unit in (*left_over, root):
            self._look_ups(unit)
        for unit in (root, *left_over):
            self._reduce_unit(unit)
        self._free("reduced", self._sent + self._summed)

    def _gather(self, unit: _Unit) -> int:
        """Cast, and all-gather into one buffer; on one rank there is nothing to send.

        Returns:
            Bytes of the buffer.
        """
        if self._shards == 1:
            return 0
        cast = unit.local * self._compute if self._casts else 0
        self._take("gathered", cast)
        output = self._take("gathered", unit.full * self._compute)
        self._free("gathered", cast)
        return output

    def _gradients(self, numel: int) -> None:
        """Whole gradients, in the dtype of the weights that forward used."""
        self._take("reduced", numel * self._compute)

    def _look_ups(self, unit: _Unit) -> None:
        """Gradients of tables; of a tied one it lies beside the head's until they are added."""
        part = self._take("reduced", unit.twice * self._compute)
        self._gradients(unit.late - unit.twice)
        self._free("reduced", part)

    def _reduce_unit(self, unit: _Unit) -> None:
        """Free the weights, copy the gradients, reduce-scatter, cast to the dtype of the shards."""
        self._free("gathered", unit.full * self._compute)
        self._free("reduced", self._sent)
        self._sent = self._take("reduced", unit.full * self._reduce)
        self._free("reduced", (unit.early + unit.late) * self._compute)
        output = self._take("reduced", unit.local * self._reduce)
        if self._reduce == self._stored:  # the output is the gradient: moved, not allocated
            self._free("reduced", output)
        self._take("gradients", unit.local * self._stored)
        if self._release:
            self._free("gradients", unit.local * self._stored)
        if self._reduce != self._stored and self._replicated:
            self._summed += output
        elif self._reduce != self._stored:
            self._free("reduced", output)

    def _take(self, owner: str, size: int) -> int:
        return self._ledger.take(owner, size)

    def _free(self, owner: str, size: int) -> None:
        self._ledger.give(owner, size)
