"""Everything on every rank: one process, or DDP."""

from __future__ import annotations

from amsf_dist.estimate.ledger import Ledger
from amsf_dist.estimate.moments import BYTES, blocks_of
from amsf_dist.estimate.recipe import Recipe
from amsf_dist.estimate.structure import Structure

__all__ = ["replicated"]


def replicated(structure: Structure, recipe: Recipe, buckets: bool) -> Ledger:
    """The end of backward, the fullest moment of a step.

    The 16-bit copies that autocast makes of weights are gone by then: backward drops two bytes
    with every gradient of four that it makes.

    Args:
        structure: of the model.
        recipe: of the optimizer.
        buckets: DDP copies gradients into buckets, and keeps them
            (`gradient_as_bucket_view=False`, its default).
    """
    whole = structure.numel * recipe.stored.itemsize
    numels = [weight.numel for weight in structure.weights]
    lines = {owner: sum(map(line, numels)) for owner, line in recipe.lines.items()}
    parts = blocks_of(structure, recipe)
    if parts is not None:
        lines["v"] = BYTES * sum(part.num_blocks for part in parts)
    ledger = Ledger({"weights": whole, **lines, "reduced": whole if buckets else 0})
    # at the very end an embedding's gradient lies beside that of the head it is tied to
    tied = sum(weight.numel for weight in structure.weights if weight.looked_up and weight.uses > 1)
    if recipe.release:
        _released(structure, ledger, tied, recipe.stored.itemsize)
        return ledger
    part = ledger.take("gradients", tied * recipe.stored.itemsize)
    ledger.take("gradients", whole)
    ledger.give("gradients", part)
    return ledger


def _released(structure: Structure, ledger: Ledger, tied: int, size: int) -> None:
    """One module's gradients after another; that of a tied weight begins with its last use."""
    first = ledger.take("gradients", tied * size)
    for call in structure.calls:
        numel = sum(weight.numel for weight in call if not (weight.looked_up and weight.uses > 1))
        ledger.give("gradients", ledger.take("gradients", numel * size))
    ledger.give("gradients", first + ledger.take("gradients", tied * size))
