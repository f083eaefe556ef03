"""The model behind an optimizer: whether its parameters are ours and hold what they should."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from amsf_dist import checks, stamp
from amsf_dist.kernels import Holding
from amsf_dist.shards import forget_gathered

__all__ = ["Watch"]


class Watch:
    """Looks at the model before its weights are used.

    Attributes:
        stamps: id(parameter) -> first weight at y of a loaded state that was not used yet.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        """Hold no model alive.

        Args:
            model: None when the optimizer was given parameters alone.
        """
        self._model = None if model is None else weakref.ref(model)
        self._proven = False
        self.stamps: Mapping[int, float | None] = {}

    @property
    def model(self) -> nn.Module | None:
        """The model while it lives."""
        return None if self._model is None else self._model()

    def before_step(self, groups: Sequence[Mapping[str, Any]], holdings: Sequence[Holding]) -> None:
        """Raise RuntimeError, before anything has changed, for what cannot be right."""
        checks.refuse_gradients(groups)
        self.refuse_replaced(groups)
        self._refuse_mixed_up(holdings)

    def inside_backward(
        self, groups: Sequence[Mapping[str, Any]], holdings: Sequence[Holding]
    ) -> None:
        """The same where FSDP has put gathered weights in the place of ours for a while."""
        checks.refuse_gradients(groups)
        self._refuse_mixed_up(holdings)

    def refuse_replaced(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise RuntimeError if the model has dropped our parameters for others; look once."""
        if not self._proven and (model := self.model) is not None:
            self._proven = True
            checks.refuse_replaced(model, groups)

    def between_steps(self, holdings: Sequence[Holding]) -> None:
        """Before the weights are read or written as a whole."""
        self.forget_gathered()
        self._refuse_mixed_up(holdings)

    def forget_gathered(self) -> None:
        """Drop whole weights that a wrapper keeps from the last forward."""
        if (model := self.model) is not None:
            forget_gathered(model)

    def _refuse_mixed_up(self, holdings: Sequence[Holding]) -> None:
        """Once after loading: the model's file may be of the other mode."""
        stamps, self.stamps = self.stamps, {}
        if stamps:
            stamp.refuse_mixed_up(holdings, stamps)
