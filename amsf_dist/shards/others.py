"""Tensors cut in several ways at once (rows and columns): a layout for each way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from amsf_dist.shards.layout import Layout, Part

__all__ = ["with_others"]


def with_others(
    parts: Sequence[Part], produce: Callable[[Sequence[Part], Sequence[int]], Layout]
) -> Layout:
    """The layout of a visible tensor, with those of the further ways in which its parts are cut.

    Args:
        parts: the parameters in it.
        produce: parts, cut in one way each, and their places in the tensor -> their layout, with a
            piece for each.
    """
    layout = produce(parts, range(len(parts)))
    places = [place for place, part in enumerate(parts) if part.blocks.others]
    ways = [[replace(parts[p], blocks=way) for way in parts[p].blocks.others] for p in places]
    others = tuple(produce(of_way, places) for of_way in zip(*ways, strict=True))
    pieces = list(layout.pieces)
    for place, same in zip(places, zip(*(o.pieces for o in others), strict=True), strict=True):
        pieces[place] = replace(pieces[place], others=same)
    return replace(layout, pieces=tuple(pieces), others=others)
