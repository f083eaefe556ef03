"""State beside the weights: creation, the counters, dtype-safe loading by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from amsf_dist.blocks import canonical_name
from amsf_dist.rules import Rule
from amsf_dist.shards import Layout, copy_into
from amsf_dist.storage import Storage

__all__ = ["MOMENT", "STASH", "Counters", "check", "create", "load", "match"]

logger = logging.getLogger(__name__)

MOMENT = "exp_avg_sq"
STASH = "y"
"""Exact training weights, kept only while the parameters hold x."""


class Counters:
    """One fp64 number per parameter and counter, on the device of the weights.

    They live on the device so that a step which turns out not to be finite can be taken back
    without asking the host, and in one vector so that advancing them costs a few launches for all
    parameters together. `state[param]` holds 0-dim views of them under torch's own key "step".
    """

    def __init__(self, rule: Rule, states: Sequence[dict[str, Any]], device: torch.device) -> None:
        """Take over what the states hold (zero where they hold nothing yet).

        Args:
            rule: names the counters.
            states: of the parameters; their counters become views of the vectors.
            device: of the weights.
        """
        self.values = {
            name: torch.tensor(
                [_number(state.get(name)) for state in states],
                dtype=torch.float64,
                device=device,
            )
            for name in rule.counters
        }
        for index, state in enumerate(states):
            for name, vector in self.values.items():
                state[name] = vector[index]


def _number(counter: Tensor | None) -> float:
    return 0.0 if counter is None or counter.is_meta else float(counter)


def create(param: Tensor, layout: Layout, rule: Rule, storage: Storage) -> dict[str, Any]:
    """All of one parameter's tensors, zero; the counters follow with `Counters`.

    Args:
        param: as the optimizer sees it.
        layout: where its numbers lie.
        rule: names the lines.
        storage: of the lines.
    """
    state: dict[str, Any] = {}
    for line in rule.lines:
        state.update(storage.allocate(line, param))
    memory = layout.local(param.detach())
    dtype = torch.promote_types(param.dtype, torch.float32)
    moments = torch.zeros(layout.num_blocks, dtype=dtype, device=memory.device)
    state[MOMENT] = layout.as_state(moments)
    return state


def match(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> dict[int, Any]:
    """Find which saved parameter is which of ours.

    Args:
        groups: our parameter groups.
        saved: the parameter groups of a state dict.

    Returns:
        id(param) -> key in the saved "state": by name where both sides have names, else by order.

    Raises:
        ValueError: other groups, other numbers of parameters, or other names.
    """
    if len(groups) != len(saved):
        raise ValueError(
            f"the state dict has {len(saved)} parameter groups, this optimizer {len(groups)}; "
            "build the optimizer with the groups it was saved with"
        )
    found: dict[int, Any] = {}
    for number, (ours, theirs) in enumerate(zip(groups, saved, strict=True)):
        if len(ours["params"]) != len(theirs["params"]):
            raise ValueError(
                f"parameter group {number}: the state dict has {len(theirs['params'])} parameters, "
                f"this optimizer {len(ours['params'])}"
            )
        keys = theirs["params"]
        if "param_names" in ours and "param_names" in theirs:
            by_name = dict(zip(map(canonical_name, theirs["param_names"]), keys, strict=True))
            names = [canonical_name(name) for name in ours["param_names"]]
            if missing := [name for name in names if name not in by_name]:
                unused = [name for name in by_name if name not in names]
                raise ValueError(
                    f"parameter group {number}: the state dict knows no parameter named "
                    f"{missing[0]!r} ({len(missing)} such; it has {unused[:3]} instead); load the "
                    "state of the same model"
                )
            keys = [by_name[name] for name in names]
        found.update((id(p), key) for p, key in zip(ours["params"], keys, strict=True))
    return found


def check(name: str, ours: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse one parameter's saved state before anything is changed.

    Raises:
        ValueError: lines are missing, or have another shape.
    """
    for key, value in ours.items():
        if key == STASH:
            continue
        if key not in saved:
            raise ValueError(
                f"{name}: the state dict has no {key!r} (it has {sorted(map(str, saved))}); it was "
                "saved by another optimizer or with another averaging="
            )
        shape = tuple(saved[key].shape) if isinstance(saved[key], Tensor) else ()
        if shape != tuple(value.shape):
            cure = (
                "build it with the blocks= and head_dim= of then"
                if key == MOMENT
                else ("load the state of the same model")
            )
            raise ValueError(
                f"{name}: {key!r} was saved with shape {shape}, this optimizer needs "
                f"{tuple(value.shape)}; {cure}"
            )


def load(ours: dict[str, Any], saved: Mapping[str, Any], like: Tensor) -> None:
    """Copy one parameter's saved state into ours, in place, in our dtypes.

    torch's own loading would cast state to the parameter's dtype: fp32 moments of bf16 weights
    would come back rounded.

    Args:
        ours: live state.
        saved: passed `check`.
        like: the parameter.
    """
    for key, value in ours.items():
        if key != STASH:
            copy_into(value, saved[key])
    ours.pop(STASH, None)
    if STASH in saved:
        ours[STASH] = torch.empty_like(like, requires_grad=False)
        copy_into(ours[STASH], saved[STASH])
