"""Memory before there is a run: what a process holds at the fullest moment of a step, by owner.

A model's shapes, an optimizer's bytes and an engine's order of allocating and freeing, followed on
paper; `tests/equal/test_memory.py` counts the storages of real runs beside it. docs/memory.md.
"""

from __future__ import annotations

from amsf_dist.estimate.buffers import Buffers
from amsf_dist.estimate.ledger import OWNERS
from amsf_dist.estimate.predict import ENGINES, RELEASING, Cluster, Row, predict, rows_for
from amsf_dist.estimate.recipe import Recipe, amsf_recipe, recipes
from amsf_dist.estimate.structure import Structure, read_structure

__all__ = [
    "ENGINES",
    "OWNERS",
    "RELEASING",
    "Buffers",
    "Cluster",
    "Recipe",
    "Row",
    "Structure",
    "amsf_recipe",
    "predict",
    "read_structure",
    "recipes",
    "rows_for",
]
