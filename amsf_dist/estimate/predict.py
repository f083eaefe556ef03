"""One question, every engine: what does a process hold at the fullest moment of a step?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from amsf_dist.estimate.buffers import Buffers
from amsf_dist.estimate.fsdp1 import fsdp1
from amsf_dist.estimate.fsdp2 import fsdp2
from amsf_dist.estimate.ledger import Ledger
from amsf_dist.estimate.recipe import Recipe, recipes
from amsf_dist.estimate.replicated import replicated
from amsf_dist.estimate.structure import Structure
from amsf_dist.estimate.zero import zero
from amsf_dist.estimate.zero3 import zero3

__all__ = ["ENGINES", "RELEASING", "Cluster", "Row", "predict", "rows_for"]


@dataclass(frozen=True)
class Cluster:
    """How many, and how they are told to share.

    Attributes:
        gpus: processes; 1 for "single".
        replicas: of all shards together, under "fsdp2" (HSDP).
        buffers: of DeepSpeed.
    """

    gpus: int
    replicas: int = 1
    buffers: Buffers = Buffers()

    def check(self, engine: str) -> None:
        """Refuse what makes no sense.

        Raises:
            ValueError: with the range.
        """
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
        if self.gpus < 1 or (engine == "single" and self.gpus != 1):
            raise ValueError(f"gpus must be 1 for single and at least 1 otherwise; got {self.gpus}")
        if self.replicas < 1 or self.gpus % self.replicas:
            raise ValueError(f"replicas must divide the {self.gpus} gpus; got {self.replicas}")
        if self.replicas > 1 and engine != "fsdp2":
            raise ValueError(f"replicas go with fsdp2, not {engine}")


_Engine = Callable[[Structure, Recipe, Cluster], Ledger]

ENGINES: dict[str, _Engine] = {
    "single": lambda structure, recipe, cluster: replicated(structure, recipe, False),
    "ddp": lambda structure, recipe, cluster: replicated(structure, recipe, True),
    "fsdp1": lambda structure, recipe, cluster: fsdp1(structure, recipe, cluster.gpus),
    "fsdp2": lambda structure, recipe, cluster: fsdp2(
        structure, recipe, cluster.gpus, cluster.replicas
    ),
    "zero1": lambda structure, recipe, cluster: zero(
        structure, recipe, cluster.gpus, 1, cluster.buffers
    ),
    "zero2": lambda structure, recipe, cluster: zero(
        structure, recipe, cluster.gpus, 2, cluster.buffers
    ),
    "zero3": lambda structure, recipe, cluster: zero3(
        structure, recipe, cluster.gpus, cluster.buffers
    ),
}

RELEASING = ("single", "fsdp2")
"""Engines under which gradients can be released."""


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


def predict(structure: Structure, recipe: Recipe, engine: str, cluster: Cluster) -> Row:
    """The fullest moment of a step, without activations.

    Args:
        structure: of the model.
        recipe: of the optimizer.
        engine: one of `ENGINES`.
        cluster: the processes.

    Raises:
        ValueError: the engine is not known or releases no gradients, or the number of processes
            makes no sense for it.
    """
    cluster.check(engine)
    if recipe.release and engine not in RELEASING:
        raise ValueError(f"gradient release works under {' and '.join(RELEASING)}; got {engine!r}")
    ledger = ENGINES[engine](structure, recipe, cluster)
    shards = 1 if engine in ("single", "ddp") else cluster.gpus // cluster.replicas
    owners, gathered = ledger.at_the_fullest(), ledger.most["gathered"]
    return Row(recipe.name, owners, gathered, structure.numel / shards)


def rows_for(
    structure: Structure,
    engine: str,
    cluster: Cluster,
    dtype: torch.dtype,
    release: bool = False,
) -> list[Row]:
    """The table: AdamW, Adam-mini, FlashAdamW and AMSF's settings, where the engine has them.

    Args:
        structure: of the model.
        engine: one of `ENGINES`.
        cluster: the processes.
        dtype: bf16 or fp32, see `recipes`.
        release: gradient release for the optimizers that have it: FlashAdamW and AMSF.

    Raises:
        ValueError: as `predict`.
    """
    found = recipes(engine.startswith("zero"), dtype)
    if engine == "fsdp1":  # which FlashOptim does not support
        found = [recipe for recipe in found if recipe.name != "FlashAdamW"]
    if release:
        found = [
            replace(recipe, release=recipe.name.startswith(("FlashAdamW", "AMSF")))
            for recipe in found
        ]
    return [predict(structure, recipe, engine, cluster) for recipe in found]
