"""Loading a saved state: checked as a whole first, then copied by name, in our dtypes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from amsf_dist.groups import names_of
from amsf_dist.hyper import Hyper
from amsf_dist.kernels import Holding
from amsf_dist.shards import copy_into
from amsf_dist.state import MOMENT, STASH

__all__ = ["load"]

logger = logging.getLogger(__name__)

# Fixed when a group is made: they decide what the state looks like; loading leaves them alone.
_STRUCTURE = ("averaging", "blocks", "head_dim", "weight_storage", "state_storage", "seed")


def load(
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Any]],
    holdings: Sequence[Holding],
    state_dict: Mapping[str, Any],
) -> None:
    """Take over a saved state.

    Args:
        groups: ours; hyper-parameters are updated in place.
        state: ours; tensors are written in place.
        holdings: all that have state.
        state_dict: as `torch.optim.Optimizer.state_dict` gives it.

    Raises:
        ValueError: it belongs to other parameters, groups, blocks or averaging; nothing is changed.
    """
    saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
    keys = _match(groups, saved_groups)
    saved = {id(h.param): saved_state.get(keys[id(h.param)]) for h in holdings}
    for holding in holdings:
        if (entries := saved[id(holding.param)]) is not None:
            _check(holding.name or "a parameter", state[holding.param], entries)
    options = [
        _options(number, ours, theirs)
        for number, (ours, theirs) in enumerate(zip(groups, saved_groups, strict=True))
    ]

    for holding in holdings:
        if (entries := saved[id(holding.param)]) is None:
            logger.warning("%s: no saved state, it starts anew", holding.name or "a parameter")
        else:
            _copy(state[holding.param], entries, holding.param.detach())
    for group, changes in zip(groups, options, strict=True):
        group.update(copy.deepcopy(changes))


def _match(
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
            by_name = dict(zip(names_of(theirs), keys, strict=True))
            names = names_of(ours)
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


def _check(name: str, ours: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
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


def _copy(ours: dict[str, Any], saved: Mapping[str, Any], like: Tensor) -> None:
    """Copy one parameter's saved state into ours, in place, in our dtypes.

    torch's own loading would cast state to the parameter's dtype: fp32 moments of bf16 weights
    would come back rounded.

    Args:
        ours: live state.
        saved: passed `_check`.
        like: the parameter.
    """
    for key, value in ours.items():
        if key != STASH:
            copy_into(value, saved[key])
    ours.pop(STASH, None)
    if STASH in saved:
        ours[STASH] = torch.empty_like(like, requires_grad=False)
        copy_into(ours[STASH], saved[STASH])


def _options(number: int, group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved group may change in ours, checked."""
    if saved.get("averaging", group["averaging"]) != group["averaging"]:
        raise ValueError(
            f"parameter group {number} was saved with averaging={saved['averaging']!r}, this "
            f"optimizer has {group['averaging']!r}; build it with the saved one"
        )
    fixed = ("params", "param_names", *_STRUCTURE)
    changes = {key: value for key, value in saved.items() if key not in fixed}
    known = Hyper.__dataclass_fields__
    Hyper.of({key: value for key, value in changes.items() if key in known})
    return {"train_mode": True, **changes}
