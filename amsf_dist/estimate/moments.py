"""How many block moments a rank keeps: the block table's own arithmetic, with no rank at hand."""

from __future__ import annotations

from amsf_dist.audit import parts_of
from amsf_dist.estimate.recipe import Recipe
from amsf_dist.estimate.structure import Structure
from amsf_dist.shards import Part, on_paper

__all__ = ["BYTES", "blocks_of", "in_interval", "in_mesh"]

BYTES = 4
"""A moment is fp32 whatever the weights are."""


def blocks_of(structure: Structure, recipe: Recipe) -> list[Part] | None:
    """How every weight is cut, in the order of the weights; None: the recipe has no blocks.

    Where Adam-mini's own partition cannot be made (heads of unknown size), rows stand for it.

    Raises:
        ValueError: as `AMSF`.
    """
    if recipe.blocks is None:
        return None
    try:
        return parts_of(structure.model, recipe.blocks)
    except ValueError:
        if recipe.blocks["blocks"] != "adam_mini":
            raise
        return parts_of(structure.model, {**recipe.blocks, "blocks": "auto"})


def in_mesh(part: Part, replicas: int, shards: int) -> int:
    """Moments on the first of the ranks that FSDP2 gives rows to."""
    layout = on_paper(part, [replicas, shards] if replicas > 1 else [shards])
    return sum(cut.num_blocks for cut in (layout, *layout.others))


def in_interval(part: Part, start: int, stop: int) -> int:
    """Moments of the blocks that have a number in [start, stop) of the stored weight."""
    if stop <= start:
        return 0
    if part.blocks.order is not None and part.blocks.kind in ("row", "head"):
        return part.num_blocks  # its rows lie across memory
    size = part.blocks.block_numel
    return (stop - 1) // size - start // size + 1
