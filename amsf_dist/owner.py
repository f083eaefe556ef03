"""Who keeps the weights, when that is not the model: an engine with tensors of its own.

DeepSpeed builds the optimizer on the model's parameters, then trains fp32 partitions in their place
and shows them to the optimizer one group or sub-group at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from amsf_dist.groups import Seat
from amsf_dist.shards import Flats

__all__ = ["Expected", "Owner", "building", "is_building"]


class Owner(Protocol):
    """What the optimizer needs to know of an engine, and to ask of it."""

    @property
    def units(self) -> Sequence[Sequence[Seat]]:
        """The tensors that step together, the same on every rank."""

    @property
    def flats(self) -> Flats:
        """Which parts of which parameters lie in them."""

    def before_step(self) -> None:
        """Raise RuntimeError if no step can be right now."""

    def shown(self) -> AbstractContextManager[None]:
        """Inside the block the parameter groups hold all tensors."""

    def publish(self) -> None:
        """Bring what the tensors hold into the weights of the model; every rank must call it."""

    def whole(
        self, tensors: Mapping[int, Tensor], model: nn.Module, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """A model's state dict with other numbers in it; every rank must call it.

        Args:
            tensors: id(tensor) -> what to read in its place.
            model: of the engine.
            dtype: of the trained parameters; None: the model's.
        """

    def extras(self) -> dict[str, Any]:
        """What a state dict needs beside torch's part, so that any sharding can load it."""


_building: ContextVar[bool] = ContextVar("amsf_dist_engine_is_building", default=False)


@contextmanager
def building() -> Iterator[None]:
    """Optimizers that are built inside the block will be bound to an engine after it."""
    token = _building.set(True)
    try:
        yield
    finally:
        _building.reset(token)


def is_building() -> bool:
    """Whether an engine is being built now."""
    return _building.get()


class Expected:
    """Stands in until the engine is there: no tensors, no state, no steps."""

    units: Sequence[Sequence[Seat]] = ()
    flats: Flats = {}

    def before_step(self) -> None:
        """Let the trial step pass that an engine under construction takes with zero gradients."""
        if not is_building():
            raise RuntimeError(
                "the parameters are partitioned by deepspeed.zero.Init, and no engine trains them: "
                "hand the optimizer, or its name in the JSON, to deepspeed.initialize"
            )

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Nothing to show."""
        yield

    def publish(self) -> None:
        """Nothing has changed."""

    def whole(
        self, tensors: Mapping[int, Tensor], model: nn.Module, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """The model as it is."""
        return model.state_dict()

    def extras(self) -> dict[str, Any]:
        """None."""
        return {}
