"""Groups of a line that shard boundaries cut: what ranks must tell each other to agree on a scale.

Storages may keep a scale per group of numbers (storage/grouped.py). Groups lie on the whole
parameter's line, so a boundary may fall into one. Which are cut is decided from global metadata
only, so that all ranks send alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from amsf_dist.shards.layout import Axis, Seam
from amsf_dist.storage.grouped import GROUP

__all__ = ["seam_everywhere", "seam_of_boundaries", "seaming_dims"]


def seam_of_boundaries(boundaries: Sequence[int], numel: int, axis: Axis) -> Seam | None:
    """Of a line that is cut at these places, on any rank; None where no group is cut."""
    cut = sorted({place // GROUP for place in boundaries if place % GROUP and place < numel})
    if not cut:
        return None
    return Seam((axis,), len(cut), {group: slot for slot, group in enumerate(cut)})


def seam_everywhere(axes: Sequence[Axis], numel: int) -> Seam | None:
    """Of a line that is cut in so many places that every group has a slot."""
    return Seam(tuple(axes), -(-numel // GROUP)) if axes and numel else None


def seaming_dims(line: Sequence[int], splits: Sequence[tuple[int, int, int]]) -> tuple[int, ...]:
    """Mesh dims whose boundaries may fall into groups; the others' never do.

    Args:
        line: the parameter's shape in line order.
        splits: (mesh dim, dim of the line that it cuts as `torch.chunk` does, ranks), in the order
            in which they cut.
    """
    seaming: list[int] = []
    crooked: set[int] = set()
    lengths = {dim: {size} for dim, size in enumerate(line)}
    for mesh_dim, dim, ranks in splits:
        inner = math.prod(line[dim + 1 :])
        # a box begins at a multiple of its dim's stride, and at one of a chunk within that
        aligned = dim == 0 or line[dim] * inner % GROUP == 0
        parts = set()
        for length in lengths[dim]:
            chunk = -(-length // ranks)
            aligned = aligned and (chunk >= length or chunk * inner % GROUP == 0)
            parts |= {chunk, length % chunk} - {0} if chunk else set()
        lengths[dim] = parts
        if not aligned or dim in crooked:  # what a crooked cut leaves begins anywhere
            crooked.add(dim)
            seaming.append(mesh_dim)
    return tuple(seaming)
