"""fp16 without ZeRO: scale the loss, which DeepSpeed (seen in 0.19.8) forgets there.

Its wrapper divides the gradients by the loss scale before a step, but `engine.backward` multiplies
the loss only for ZeRO's wrappers. Gradients then arrive 65,536 times too small: an optimizer that
divides by their size hides it until eps, or clipping by the norm, takes part.
"""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["scale_loss_in_backward"]


def scale_loss_in_backward(engine: Any) -> None:
    """Make `engine.backward` scale the loss if this engine's wrapper counts on it and nobody does.

    Args:
        engine: bound or about to be.
    """
    scale = getattr(engine.optimizer, "loss_scale_config", None)
    if scale is None or not scale.use_grad_scaling or hasattr(engine.optimizer, "scale_if_loss"):
        return
    backward = engine.backward

    @functools.wraps(backward)
    def scaled_backward(loss: Any, *args: Any, **kwargs: Any) -> Any:
        factor = engine.optimizer.loss_scale
        return backward(loss.float() * factor, *args, **kwargs) / factor

    engine.backward = scaled_backward
