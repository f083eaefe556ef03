"""The name "AMSF" for DeepSpeed's JSON, and the places where an engine and our optimizer meet.

DeepSpeed looks a name that it does not know up in torch.optim, and has no other registry. What it
does to an optimizer afterwards (other tensors, shown in part) needs a look at the engine, for which
it has no hook: so two methods of its engine are wrapped, and do nothing for other optimizers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

from amsf_dist.integrations.on_import import on_import
from amsf_dist.optimizer import AMSF
from amsf_dist.owner import Expected, building

__all__ = ["register"]

NAME = "AMSF"
_OURS = ("weight_lr_power", "train_mode", "averaging")  # keys that only our parameter groups have


def register() -> None:
    """Make `"optimizer": {"type": "AMSF"}` known to DeepSpeed, whenever it is imported."""
    setattr(torch.optim, NAME, AMSF)
    on_import("deepspeed.runtime.engine", _wrap_engine)


def _wrap_engine(module: ModuleType) -> None:
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    ZERO_SUPPORTED_OPTIMIZERS.append(AMSF)
    engine_class: Any = module.DeepSpeedEngine
    configure, load = engine_class._configure_optimizer, engine_class.load_checkpoint

    @functools.wraps(configure)
    def _configure_optimizer(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        from amsf_dist.integrations.deepspeed import refusals
        from amsf_dist.integrations.deepspeed.engine import Engine

        if _was_ours(client_optimizer):
            refusals.refuse_replacement(type(client_optimizer).__name__)
        if isinstance(client_optimizer, AMSF):
            _expect(self)
            _hand_over(client_optimizer)
        elif client_optimizer is None and self.optimizer_name() == NAME:
            refusals.refuse_settings(self)
        elif callable(client_optimizer):
            client_optimizer = _checked(self, client_optimizer)
        with building():
            configure(self, client_optimizer, model_parameters)
        if isinstance(self.basic_optimizer, AMSF):
            refusals.refuse_masters(self.optimizer, self.basic_optimizer.param_groups)
            refusals.refuse_clipping(self.basic_optimizer.param_groups)
            refusals.warn_of_clipping(self._config)
            Engine.bind(self)

    @functools.wraps(load)
    def load_checkpoint(self: Any, load_dir: str, tag: str | None = None, **kwargs: Any) -> Any:
        from amsf_dist.integrations.deepspeed.loading import load_checkpoint as load_ours

        if isinstance(self.basic_optimizer, AMSF):
            return load_ours(self, functools.partial(load, self), load_dir, tag, **kwargs)
        return load(self, load_dir, tag, **kwargs)

    engine_class._configure_optimizer = _configure_optimizer
    engine_class.load_checkpoint = load_checkpoint


def _expect(engine: Any) -> None:
    """Refuse what cannot be right for an AMSF that does not come from the JSON."""
    from amsf_dist.integrations.deepspeed import refusals

    refusals.refuse_client(engine)
    refusals.refuse_settings(engine)


def _checked(engine: Any, make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A callable that makes an optimizer, and a look at what it made."""

    def made(params: Any) -> Any:
        optimizer = make(params)
        if isinstance(optimizer, AMSF):
            _expect(engine)
        return optimizer

    return made


def _hand_over(optimizer: AMSF) -> None:
    """Make an optimizer that was built on the model's parameters wait for the engine's.

    Raises:
        RuntimeError: it has been trained, or has loaded a state: the engine would lose it.
    """
    if any(float(state.get("step", 0.0)) > 0.0 for state in optimizer.state.values()):
        raise RuntimeError(
            "this AMSF has a trained state, and DeepSpeed puts other tensors in the place of its "
            "parameters: give deepspeed.initialize a new optimizer, then load the state with "
            "amsf_dist.integrations.deepspeed.load_state_dict(engine, ...)"
        )
    optimizer.bind(Expected())


def _was_ours(optimizer: Any) -> bool:
    if isinstance(optimizer, AMSF):
        return False
    groups = getattr(optimizer, "param_groups", ())
    return any(
        isinstance(group, Mapping) and all(key in group for key in _OURS) for group in groups
    )
