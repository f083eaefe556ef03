"""What a user may set, with defaults, ranges and the messages for values outside them."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from amsf_dist.rules import RULES

__all__ = ["LATER", "Hyper"]

# Words of the public contract whose code arrives in a later version: refused with the cure, not
# silently replaced by something else.
LATER: dict[str, dict[str, str]] = {
    "lr_adaptation": {"grad_norm": "None"},
}
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "decay": ("all", "matrices"),
    "weight_storage": ("auto", "native", "kahan", "bf16+8", "bf16+16", "stochastic"),
    "state_storage": ("auto", "fp32", "bf16", "int8"),
    "lr_adaptation": (None,),
    "clip": (None, "block", "tensor", "norm"),
    "nonfinite": ("step", "block"),
}


@dataclass(frozen=True)
class Hyper:
    """Checked hyper-parameters of one parameter group; field names are `AMSF`'s arguments.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range; the message names the value, the range and the cure.
    """

    lr: float | torch.Tensor = 2.5e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    averaging: str = "schedule_free"
    blocks: Any = "auto"  # checked by amsf_dist.blocks, one floor up
    head_dim: int | None = None
    warmup_steps: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0
    decay: str = "all"
    decouple_lr: bool = False
    max_lr: float | None = None
    weight_storage: str = "auto"
    state_storage: str = "auto"
    lr_adaptation: str | None = None
    seed: int = 0
    deterministic: bool = False
    clip: str | None = None
    max_norm: float | None = None
    nonfinite: str = "step"

    def __post_init__(self) -> None:
        """Check every field."""
        _learning_rate(self.lr)
        object.__setattr__(self, "betas", _betas(self.betas))
        _number("eps", self.eps, low=0.0)
        _number("weight_decay", self.weight_decay, low=0.0)
        _number("r", self.r, low=0.0)
        _number("weight_lr_power", self.weight_lr_power, low=0.0)
        _whole("warmup_steps", self.warmup_steps, low=0)
        _whole("seed", self.seed, low=0)
        if self.head_dim is not None:
            _whole("head_dim", self.head_dim, low=1)
        for switch in ("decouple_lr", "deterministic"):
            if not isinstance(value := getattr(self, switch), bool):
                raise TypeError(f"{switch} must be True or False, got {value!r}")
        if self.max_lr is not None:
            _number("max_lr", self.max_lr, low=0.0, open_low=True)
        elif self.decouple_lr and not float(self.lr) > 0.0:
            raise ValueError(
                f"decouple_lr=True divides by the highest learning rate, and lr is {self.lr}; "
                "pass max_lr, the highest learning rate of your schedule"
            )
        _choice("averaging", self.averaging, tuple(RULES))
        for name, allowed in _CHOICES.items():
            _choice(name, getattr(self, name), allowed)
        self._check_clip()

    def _check_clip(self) -> None:
        if self.max_norm is not None:
            _number("max_norm", self.max_norm, low=0.0, open_low=True)
            if self.clip not in (None, "norm"):
                raise ValueError(
                    f"max_norm={self.max_norm} is the limit of clip='norm', got clip={self.clip!r}"
                )
        elif self.clip == "norm":
            raise ValueError("clip='norm' needs max_norm, the largest norm of all gradients")
        norms = self.clip in ("norm", "tensor") or self.max_norm is not None
        if self.deterministic and norms:
            raise ValueError(
                "norms are sums whose bits depend on the number of ranks: with deterministic=True "
                "use clip='block'"
            )
        if self.nonfinite == "block" and norms:
            raise ValueError(
                "one gradient that is not finite makes the norm so, and no block could move: with "
                "nonfinite='block' use clip='block'"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Hyper:
        """Check a mapping (a parameter group, a config section) and give its `Hyper`.

        Args:
            options: keys are `AMSF` arguments.

        Raises:
            TypeError: a key is not an argument; the message has the nearest one that is.
        """
        known = [field.name for field in fields(cls)]
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise TypeError(f"AMSF has no argument {key!r}; {hint}")
        return cls(**options)

    def as_given(self) -> dict[str, Any]:
        """The fields: an lr tensor stays the user's handle, rules for blocks become our own."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**given, "blocks": copy.deepcopy(self.blocks)}

    def as_group(self) -> dict[str, Any]:
        """The fields as a parameter group carries them, `max_lr` filled in where it is used."""
        group = self.as_given()
        if self.decouple_lr and self.max_lr is None:
            group["max_lr"] = float(self.lr)
        if self.max_norm is not None:
            group["clip"] = "norm"
        return group


def _number(name: str, value: Any, *, low: float, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if isinstance(value, str) else ""
        raise TypeError(f"{name} must be a number, got {value!r}{hint}")
    if not math.isfinite(value) or value < low or (open_low and value == low):
        bound = f"> {low:g}" if open_low else f">= {low:g}"
        raise ValueError(f"{name} must be finite and {bound}, got {value!r}")


def _whole(name: str, value: Any, *, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")


def _learning_rate(lr: Any) -> None:
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr as a tensor must hold one number, got shape {tuple(lr.shape)}")
        lr = float(lr)
    _number("lr", lr, low=0.0)


def _betas(betas: Any) -> tuple[float, float]:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers (beta1, beta2), got {betas!r}")
    for index, beta in enumerate(betas, start=1):
        _number(f"beta{index}", beta, low=0.0)
        if beta >= 1.0:
            raise ValueError(f"beta{index} must be in [0, 1), got {beta!r}")
    return float(betas[0]), float(betas[1])


def _choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    if value in allowed:
        return
    if isinstance(value, str) and value in LATER.get(name, {}):
        raise ValueError(
            f"{name}={value!r} is not in this version of amsf_dist; use {LATER[name][value]!r}"
        )
    near = difflib.get_close_matches(str(value), [a for a in allowed if a], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")
