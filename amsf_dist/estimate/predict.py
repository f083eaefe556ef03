"""One question, every engine: what does a process hold at the fullest moment of a step?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from amsf_dist.estimate.buffers import Buffers
from amsf_dist.estimate.fsdp2 import fsdp2
from amsf_dist.estimate.ledger import Ledger
from amsf_dist.estimate.recipe import Recipe, recipes
from amsf_dist.estimate.replicated import replicated
from amsf_dist.estimate.structure import Structure
from amsf_dist.estimate.zero import zero
from amsf_dist.estimate.zero3 import zero3

__all__ = ["ENGINES", "Row", "predict", "rows_for"]

_Engine = Callable[[Structure, Recipe, int, Buffers], Ledger]

ENGINES: dict[str, _Engine] = {
    "single": lambda structure, recipe, gpus, buffers: replicated(structure, recipe, False),
    "ddp": lambda structure, recipe, gpus, buffers: replicated(structure, recipe, True),
    "fsdp2": lambda structure, recipe, gpus, buffers: fsdp2(structure, recipe, gpus),
    "zero1": lambda structure, recipe, gpus, buffers: zero(structure, recipe, gpus, 1, buffers),
    "zero2": lambda structure, recipe, gpus, buffers: zero(structure, recipe, gpus, 2, buffers),
    "zero3": lambda structure, recipe, gpus, buffers: zero3(structure, recipe, gpus, buffers),
}


@dataclass(frozen=True)
class Row:
    """One optimizer's memory.

    Attributes:
        name: of the recipe.
        owners: bytes by owner at the fullest moment, see `ledger.OWNERS`.
        gathered: bytes of whole weights of sharded modules when they are most, another moment.
        updated: parameters that a process updates.
    """

    name: str
    owners: dict[str, int]
    gathered: int
    updated: float

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.owners.values())

    @property
    def per_parameter(self) -> float:
        """Bytes for each parameter that the process updates."""
        return self.total / max(self.updated, 1)


def predict(
    structure: Structure, recipe: Recipe, engine: str, gpus: int, buffers: Buffers | None = None
) -> Row:
    """The fullest moment of a step, without activations.

    Args:
        structure: of the model.
        recipe: of the optimizer.
        engine: one of `ENGINES`.
        gpus: processes; 1 for "single".
        buffers: of DeepSpeed; None: its defaults.

    Raises:
        ValueError: the engine is not known, or the number of processes makes no sense for it.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    if gpus < 1 or (engine == "single" and gpus != 1):
        raise ValueError(f"gpus must be 1 for single and at least 1 otherwise; got {gpus}")
    ledger = ENGINES[engine](structure, recipe, gpus, buffers or Buffers())
    shards = 1 if engine in ("single", "ddp") else gpus
    owners, gathered = ledger.at_the_fullest(), ledger.most["gathered"]
    return Row(recipe.name, owners, gathered, structure.numel / shards)


def rows_for(
    structure: Structure,
    engine: str,
    gpus: int,
    dtype: torch.dtype,
    buffers: Buffers | None = None,
) -> list[Row]:
    """The table: AdamW, Adam-mini, FlashAdamW and AMSF's settings, where the engine has them.

    Args:
        structure: of the model.
        engine: one of `ENGINES`.
        gpus: processes.
        dtype: bf16 or fp32, see `recipes`.
        buffers: of DeepSpeed; None: its defaults.
    """
    found = recipes(engine.startswith("zero"), dtype)
    return [predict(structure, recipe, engine, gpus, buffers) for recipe in found]
