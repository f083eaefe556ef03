"""Everything on every rank: one process, or DDP."""

from __future__ import annotations

from amsf_dist.estimate.ledger import Ledger
from amsf_dist.estimate.moments import BYTES, blocks_of
from amsf_dist.estimate.recipe import Recipe
from amsf_dist.estimate.structure import Structure

__all__ = ["replicated"]


def replicated(structure: Structure, recipe: Recipe, buckets: bool) -> Ledger:
    """The moment when backward is over, the fullest of a step.

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
    ledger = Ledger({"weights": whole, **lines, "gradients": whole})
    ledger.take("reduced", whole if buckets else 0)
    return ledger
