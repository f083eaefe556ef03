"""A DeepSpeed configuration, made to fit the tiny model and three steps.

What decides which code runs (stage, precision, offload, accumulation, clipping, order of gradients)
stays. What only makes sense for the real model, or writes files, does not.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amsf_dist.hyper import Hyper

__all__ = ["MICRO_BATCH", "Trial", "options_for", "scaled"]

MICRO_BATCH = 2
_AUTO = "auto"
_MOST_MICRO_BATCHES = 4
# Large enough to be told from the rounding of bf16 weights, and a warm-up that three steps do not
# finish: a count of steps that runs too fast then shows in the learning rate.
_LR, _WARMUP_STEPS = 0.02, 4
# Sizes that make of the tiny model what the defaults make of a large one: several sub-groups, and
# both persistent and partitioned parameters.
_SUB_GROUP, _PERSISTENT = 500, 20
_LEFT_OUT = (
    "train_batch_size",
    "tensorboard",
    "wandb",
    "comet",
    "csv_monitor",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "comms_logger",
    "dump_state",
    "autotuning",
    "elasticity",
    "compression_training",
    "data_efficiency",
    "curriculum_learning",
    "nebula",
)


@dataclass(frozen=True)
class Trial:
    """What three steps run with.

    Attributes:
        config: for `deepspeed.initialize`.
        named: the optimizer that the file names; None: it names none.
        options: AMSF's arguments as the file and the trial have them.
        notes: what differs from the file, in words.
    """

    config: dict[str, Any]
    named: str | None
    options: dict[str, Any]
    notes: tuple[str, ...]


def scaled(config: Mapping[str, Any], world_size: int) -> Trial:
    """Fit a DeepSpeed configuration.

    Args:
        config: DeepSpeed's JSON; "auto" is filled as the Trainer of transformers does.
        world_size: number of processes.
    """
    fitted = copy.deepcopy(dict(config))
    notes: list[str] = []
    accumulate = _accumulation(fitted, world_size, notes)
    for key in _LEFT_OUT:
        fitted.pop(key, None)
    if fitted.pop("scheduler", None):
        notes.append("the scheduler is left out: AMSF needs none, see its warmup_steps")
    if fitted.get("gradient_clipping") == _AUTO:
        fitted["gradient_clipping"] = 1.0
    if _section(fitted, "bf16").get("enabled") == _AUTO:
        half = _section(fitted, "fp16").get("enabled") is True
        fitted["bf16"]["enabled"] = not half
        if not half:
            notes.append('"bf16": "auto" is taken as true')
    checkpoint = _section(fitted, "checkpoint")
    if checkpoint.pop("load_universal", None):
        notes.append("load_universal is left out: the trial loads what it has saved itself")
    _fit_zero(_section(fitted, "zero_optimization"), world_size, notes)
    optimizer = fitted.get("optimizer") or {}
    given = dict(optimizer.get("params") or {}) if isinstance(optimizer, Mapping) else {}
    named = optimizer.get("type") if isinstance(optimizer, Mapping) else None
    options = options_for(given)
    if named is not None:
        fitted["optimizer"] = {"type": named, "params": dict(options)}
    _without_auto(fitted)
    fitted["train_micro_batch_size_per_gpu"] = MICRO_BATCH
    fitted["gradient_accumulation_steps"] = accumulate
    fitted["steps_per_print"] = 10**9
    notes.append(
        f"lr {_LR} and warmup_steps {_WARMUP_STEPS}, so that three steps can be told from rounding"
    )
    return Trial(fitted, named, options, tuple(notes))


def options_for(given: Mapping[str, Any]) -> dict[str, Any]:
    """AMSF's arguments for the tiny model: what the user gave, but its own sizes and lr.

    Args:
        given: may hold "auto".
    """
    own = {"lr": _LR, "warmup_steps": _WARMUP_STEPS}
    # the heads of the user's model, and the top of the user's schedule
    ours = {key: value for key, value in given.items() if key not in ("head_dim", "max_lr")}
    kept = {key: value for key, value in ours.items() if value != _AUTO}
    defaults = {name: field.default for name, field in Hyper.__dataclass_fields__.items()}
    defaults = {key: value for key, value in defaults.items() if key not in ("head_dim", "max_lr")}
    return {**defaults, "weight_decay": 0.1, **kept, **own}


def _accumulation(config: Mapping[str, Any], world_size: int, notes: list[str]) -> int:
    """Micro-batches per step, as the file says or as its batch sizes imply; a few at most."""
    steps = config.get("gradient_accumulation_steps")
    if not isinstance(steps, int):
        batch, micro = (
            config.get(key) for key in ("train_batch_size", "train_micro_batch_size_per_gpu")
        )
        known = isinstance(batch, int) and isinstance(micro, int) and micro > 0
        steps = max(1, batch // (micro * world_size)) if known else 1  # type: ignore[operator]
    if steps > _MOST_MICRO_BATCHES:
        notes.append(f"{_MOST_MICRO_BATCHES} micro-batches per step in place of {steps}")
    return min(max(1, steps), _MOST_MICRO_BATCHES)


def _fit_zero(zero: dict[str, Any], world_size: int, notes: list[str]) -> None:
    if zero.get("stage") == 3:
        for key, fit in (
            ("sub_group_size", _SUB_GROUP),
            ("stage3_param_persistence_threshold", _PERSISTENT),
        ):
            value = zero.get(key)
            zero[key] = min(value, fit) if isinstance(value, int | float) else fit
    for key in ("zero_hpz_partition_size", "mics_shard_size"):
        value = zero.get(key)
        if isinstance(value, int) and value > 1 and world_size % value:
            zero[key] = world_size
            notes.append(f"{key} {world_size} in place of {value}: the number of processes")


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """A section of the configuration, to be changed in place; an empty one if it has none."""
    found = config.get(key)
    return found if isinstance(found, dict) else {}


def _without_auto(section: dict[str, Any]) -> None:
    """Leave what is still "auto" to DeepSpeed's defaults."""
    for key, value in list(section.items()):
        if isinstance(value, dict):
            _without_auto(value)
        elif value == _AUTO:
            del section[key]
