"""A step under FSDP1 (`FullyShardedDataParallel`, FULL_SHARD), on paper.

torch/distributed/fsdp (2.13), `use_orig_params=True`, backward prefetch, no offload.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from amsf_dist.estimate.ledger import Ledger
from amsf_dist.estimate.moments import BYTES, blocks_of, in_interval
from amsf_dist.estimate.recipe import Recipe
from amsf_dist.estimate.structure import Structure, Weight

__all__ = ["fsdp1"]

REDUCE = torch.float32.itemsize
"""Of reductions, as under FSDP2: `MixedPrecision(reduce_dtype=torch.float32)`."""


def fsdp1(structure: Structure, recipe: Recipe, gpus: int) -> Ledger:
    """A step on the first rank.

    Every unit of the structure is wrapped, and so is the model, whose flat parameter has the rest.
    Weights that are stored in more bits than `recipe.compute` are gathered in the latter. One
    micro-batch a step, no activations.

    Args:
        structure: of the model; its units are the wrapped modules.
        recipe: of the optimizer.
        gpus: ranks that share the weights.
    """
    flats = (structure.root, *structure.units)
    locals_ = [-(-_numel(flat) // gpus) for flat in flats]
    held = sum(locals_)
    lines = {owner: line(held) for owner, line in recipe.lines.items()}
    parts = blocks_of(structure, recipe)
    if parts is not None:
        by_weight = dict(zip(structure.weights, parts, strict=True))
        lines["v"] = 0
        for flat, local in zip(flats, locals_, strict=True):
            left = local
            for weight in flat:
                lines["v"] += BYTES * in_interval(by_weight[weight], 0, min(left, weight.numel))
                left = max(0, left - weight.numel)
    ledger = Ledger({"weights": held * recipe.stored.itemsize, **lines})
    _Step(ledger, recipe, gpus).run(structure)
    return ledger


class _Step:
    """Forward and backward of flat parameters."""

    def __init__(self, ledger: Ledger, recipe: Recipe, gpus: int) -> None:
        self._ledger, self._gpus = ledger, gpus
        self._stored = recipe.stored.itemsize
        self._compute = min(self._stored, recipe.compute.itemsize)
        self._reduce = max(REDUCE, self._compute)

    def run(self, structure: Structure) -> None:
        """The root is gathered first and stays; its gradients are the last to be reduced."""
        root, units = structure.root, structure.units
        self._gather(root)
        for unit in units:
            self._gather(unit)
            self._let_go(unit)
        early = [weight for weight in root if not weight.looked_up or weight.uses > 1]
        self._pieces(early)
        for index, unit in reversed(list(enumerate(units))):
            if index == len(units) - 1:
                self._gather(unit)
            if index:
                self._gather(units[index - 1])
            self._pieces(unit)
            self._reduce_flat(unit)
        self._pieces([weight for weight in root if weight.looked_up])  # a tied one once more
        tied = [weight for weight in root if weight.looked_up and weight.uses > 1]
        self._ledger.give("reduced", _numel(tied) * self._compute)
        self._reduce_flat(root)

    def _gather(self, flat: Sequence[Weight]) -> None:
        """Cast the shard, gather it."""
        cast = self._local(flat) * self._compute if self._compute != self._stored else 0
        self._ledger.take("gathered", cast)
        self._ledger.take("gathered", self._local(flat) * self._gpus * self._compute)
        self._ledger.give("gathered", cast)

    def _let_go(self, flat: Sequence[Weight]) -> None:
        self._ledger.give("gathered", self._local(flat) * self._gpus * self._compute)

    def _pieces(self, weights: Sequence[Weight]) -> None:
        """Gradients of single weights."""
        self._ledger.take("reduced", _numel(weights) * self._compute)

    def _reduce_flat(self, flat: Sequence[Weight]) -> None:
        """Join the pieces, cast, reduce-scatter, cast back."""
        pieces = _numel(flat) * self._compute
        joined = self._ledger.take("reduced", pieces)
        self._ledger.give("reduced", pieces)
        self._let_go(flat)
        wide = _numel(flat) * self._reduce if self._reduce != self._compute else 0
        self._ledger.take("reduced", wide)
        local = self._local(flat)
        if self._reduce != self._stored:
            output = self._ledger.take("reduced", local * self._reduce)
            self._ledger.take("gradients", local * self._stored)
            self._ledger.give("reduced", output)
        else:
            self._ledger.take("gradients", local * self._stored)
        self._ledger.give("reduced", wide + joined)

    def _local(self, flat: Sequence[Weight]) -> int:
        return -(-_numel(flat) // self._gpus)


def _numel(weights: Sequence[Weight]) -> int:
    return sum(weight.numel for weight in weights)
