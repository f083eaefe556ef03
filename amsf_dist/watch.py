"""The model behind an optimizer: whether its parameters are ours and hold what they should."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from amsf_dist import checks, stamp
from amsf_dist.kernels import Holding
from amsf_dist.rules import RULES
from amsf_dist.shards import forget_gathered

__all__ = ["Watch"]

logger = logging.getLogger(__name__)


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
        self._rates: dict[int, float] = {}
        self._warned_of_decay = False
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
        self._look_for_decay(groups)

    def inside_backward(
        self, groups: Sequence[Mapping[str, Any]], holdings: Sequence[Holding]
    ) -> None:
        """The same where FSDP has put gathered weights in the place of ours for a while."""
        checks.refuse_gradients(groups)
        self._refuse_mixed_up(holdings)
        self._look_for_decay(groups)

    def refuse_replaced(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise RuntimeError if the model has dropped our parameters for others; look once."""
        if not self._proven and (model := self.model) is not None:
            self._proven = True
            checks.refuse_replaced(model, groups)

    def loaded(self, stamps: Mapping[int, float | None]) -> None:
        """A state was loaded: its weights are not proven, and its learning rates are new ones.

        Args:
            stamps: see the class.
        """
        self.stamps, self._rates = stamps, {}

    def warn_of_decay(self, what: str) -> None:
        """Say, once for this optimizer, that averaging and a decaying learning rate do not join.

        Args:
            what: makes it decay, or has decayed; the beginning of the message.
        """
        if not self._warned_of_decay:
            self._warned_of_decay = True
            logger.warning(
                "%s, and averaging='schedule_free' needs no decay: the average does what decay is "
                "for, and late iterates of small steps hardly move it. Keep lr constant after the "
                "warm-up (no scheduler; in the Trainer of transformers "
                'lr_scheduler_type="constant"), or use averaging="ema" with the scheduler',
                what,
            )

    def _look_for_decay(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Whatever lowers lr, a scheduler or a hand, does it between two steps."""
        if self._warned_of_decay:
            return
        for group in groups:
            lr = group["lr"]
            if isinstance(lr, Tensor) or not RULES[group["averaging"]].averaged:
                continue  # reading a tensor would wait for the device
            before = self._rates.get(id(group), lr)
            self._rates[id(group)] = lr
            if lr < before:
                self.warn_of_decay(f"lr went down from {before:g} to {lr:g} between two steps")

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
