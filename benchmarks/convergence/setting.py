"""A setting: an optimizer with all its numbers. Data only; `plan.py` lists them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

__all__ = ["COARSE", "SEEDS", "STEPS", "Setting"]

STEPS = 1500
SEEDS = (0, 1, 2)
COARSE = (0,)  # one seed to choose, three to confirm


@dataclass(frozen=True)
class Setting:
    """One row of the study.

    Attributes:
        name: unique; what `run` and the table call it.
        optimizer: key of `optimizers.BUILDERS`.
        options: its arguments, as its own package calls them, `warmup_steps` included.
        weights: "fp32", or "bf16": the optimizer's parameters are bf16, see `trainee.py`.
        clip: largest global norm of the gradient; None: no clipping.
        seeds: the seeds it is run with.
    """

    name: str
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    weights: str = "fp32"
    clip: float | None = 1.0
    seeds: tuple[int, ...] = SEEDS

    def but(self, name: str, seeds: tuple[int, ...] = SEEDS, **changes: Any) -> Setting:
        """The same under another name with some options changed; `clip` and `weights` too."""
        own = {key: changes.pop(key) for key in ("clip", "weights") if key in changes}
        return replace(self, name=name, seeds=seeds, options={**self.options, **changes}, **own)

    def identity(self) -> dict[str, Any]:
        """What decides the outcome: all but the name and the seeds."""
        known = asdict(self)
        return {key: known[key] for key in ("optimizer", "options", "weights", "clip")}
