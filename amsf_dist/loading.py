"""Loading a saved state: checked as a whole first, then copied by name, in our dtypes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from amsf_dist import kernels, portable, stamp
from amsf_dist.blocks import canonical_name
from amsf_dist.clipping import COUNTER
from amsf_dist.groups import names_of
from amsf_dist.hyper import Hyper
from amsf_dist.kernels import Holding, Partition
from amsf_dist.shards import copy_into, whole
from amsf_dist.state import MOMENT, MOMENTS, STASH

__all__ = ["FIXED", "completed", "load", "moment_keys"]

logger = logging.getLogger(__name__)

# Fixed when a group is made: they decide what the state looks like; loading leaves them alone.
FIXED = (
    "params",
    "param_names",
    stamp.KEY,
    "averaging",
    "blocks",
    "head_dim",
    "weight_storage",
    "state_storage",
    "seed",
    "deterministic",
    "clip",
    "max_norm",
    "nonfinite",
)


def completed(
    state_dict: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    holdings: Sequence[Holding],
    state: Mapping[Tensor, dict[str, Any]],
    stamps: Mapping[int, float | None],
) -> dict[str, Any]:
    """What torch's state dict lacks: stamps, scales and under FSDP1 moments for every number.

    Args:
        state_dict: torch's; its inner dicts are the live ones and stay as they are.
        groups: ours.
        holdings: all that have state.
        state: ours.
        stamps: of a loaded state that was not used yet: it still belongs to those weights.
    """
    if not stamps:
        stamps = stamp.first_weights(holdings, state)
    saved_groups = [
        {**saved, stamp.KEY: stamp.written(group, holdings, stamps)}
        for saved, group in zip(state_dict["param_groups"], groups, strict=True)
    ]
    entries = dict(state_dict["state"])
    flat = {id(holding.param): holding for holding in holdings if holding.layout.moments_by_element}
    grouped = {id(holding.param): holding for holding in holdings if holding.grouping is not None}
    keys = moment_keys(list(flat.values()))
    params = [param for group in groups for param in group["params"]]
    for index, param in enumerate(params):
        if id(param) in flat:
            # a slice is a line, but where FSDP1 does not shard, its parameters keep their shapes
            holding = flat[id(param)]
            entries[index] = dict(entries[index])
            for key, partition in zip_longest(keys, holding.partitions):
                entries[index][key] = kernels.spread(holding, partition).view(param.shape)
        if id(param) in grouped:
            entries[index] = {**entries[index], **portable.spread_scales(grouped[id(param)])}
    return {**state_dict, "state": entries, "param_groups": saved_groups}


def moment_keys(holdings: Sequence[Holding]) -> list[str]:
    """Block moments that any of these have. FSDP1's functions want the same keys of all."""
    return list(MOMENTS[: max((len(holding.partitions) for holding in holdings), default=0)])


def load(
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Any]],
    holdings: Sequence[Holding],
    state_dict: Mapping[str, Any],
) -> dict[int, float | None]:
    """Take over a saved state.

    Args:
        groups: ours; hyper-parameters are updated in place.
        state: ours; tensors are written in place.
        holdings: all that have state.
        state_dict: as `torch.optim.Optimizer.state_dict` gives it.

    Returns:
        id(parameter) -> its first weight when the state was saved.

    Raises:
        ValueError: it belongs to other parameters, groups, blocks or averaging; nothing is changed.
    """
    saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
    by_element = {id(h.group) for h in holdings if h.layout.moments_by_element}
    keys = _match(groups, saved_groups, by_element)
    saved = {id(h.param): saved_state.get(keys[id(h.param)]) for h in holdings}
    for holding in holdings:
        if entries := saved[id(holding.param)]:
            _check(holding, state[holding.param], entries)
    options = [
        _options(number, ours, theirs)
        for number, (ours, theirs) in enumerate(zip(groups, saved_groups, strict=True))
    ]

    for holding in holdings:
        if entries := saved[id(holding.param)]:
            _copy(holding, state[holding.param], entries)
        elif holding.layout.numel:
            logger.warning("%s: no saved state, it starts anew", holding.name or "a parameter")
            state[holding.param].pop(STASH, None)
            for value in state[holding.param].values():
                value.zero_()
    _count_along(holdings, state, saved)
    for group, changes in zip(groups, options, strict=True):
        group.update(copy.deepcopy(changes))
    return {
        key: weight
        for group, theirs in zip(groups, saved_groups, strict=True)
        for key, weight in stamp.read(theirs.get(stamp.KEY), group, holdings).items()
    }


def _match(
    groups: Sequence[Mapping[str, Any]],
    saved: Sequence[Mapping[str, Any]],
    by_element: Collection[int],
) -> dict[int, Any]:
    """Find which saved parameter is which of ours.

    Args:
        groups: our parameter groups.
        saved: the parameter groups of a state dict.
        by_element: id of those of ours that FSDP1 shards. Its functions put the saved state in our
            order, which is the model's, and leave the names in that of the run that saved.

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
        names, known = _names(ours), _names(theirs)
        if names is not None and known is not None:
            by_name = dict(zip(known, keys, strict=True))
            if missing := [name for name in names if name not in by_name]:
                unused = [name for name in by_name if name not in names]
                raise ValueError(
                    f"parameter group {number}: the state dict knows no parameter named "
                    f"{missing[0]!r} ({len(missing)} such; it has {unused[:3]} instead); load the "
                    "state of the same model"
                )
            if id(ours) not in by_element:
                keys = [by_name[name] for name in names]
        found.update((id(p), key) for p, key in zip(ours["params"], keys, strict=True))
    return found


def _names(group: Mapping[str, Any]) -> list[str] | None:
    """Canonical names of a group's parameters, ours or saved; None when it does not tell them."""
    keys = group["params"]
    if keys and all(isinstance(key, str) for key in keys):
        # torch's functions put names in the place of numbers, and bring them in the order of the
        # optimizer that loads; "param_names" stays in that of the one that saved
        return [canonical_name(key) for key in keys]
    names = names_of(group) if "param_names" in group else []
    flat = any(name.rpartition(".")[2] == "_flat_param" for name in names)
    return None if flat or len(names) != len(keys) else names


def _check(holding: Holding, ours: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse one parameter's saved state before anything is changed.

    Raises:
        ValueError: lines are missing, or have another shape.
    """
    name = holding.name or "a parameter"
    scales = [portable.scale_key(line) for line in holding.rule.lines]
    moments = {partition.key: partition for partition in holding.partitions}
    for line in holding.rule.lines:
        if isinstance(saved.get(line), Tensor):
            portable.refuse_codes_alone(name, line, saved[line].dtype, saved)
    for key, value in ours.items():
        if key == STASH or (key not in saved and key in holding.error_keys):
            continue  # weights saved without error bits are those weights
        if key in (*scales, COUNTER) and key not in saved:
            continue  # lines saved in another storage, a run that did not clip
        if key not in saved:
            option = "blocks=" if key in moments and key != MOMENT else "averaging="
            raise ValueError(
                f"{name}: the state dict has no {key!r} (it has {sorted(map(str, saved))}); it was "
                f"saved by another optimizer or with another {option}"
            )
        shape = tuple(saved[key].shape) if isinstance(saved[key], Tensor) else ()
        fitting = [tuple(holding.param.shape if key in scales else value.shape)]
        cure = "load the state of the same model"
        if key in moments:
            fitting = [tuple(holding.param.shape)] + (
                [] if holding.layout.moments_by_element else fitting
            )
            cure = "build it with the blocks= and head_dim= of then"
        if shape not in fitting:
            raise ValueError(
                f"{name}: {key!r} was saved with shape {shape}, this optimizer needs {fitting[-1]};"
                f" {cure}"
            )
        if key not in moments or shape == tuple(value.shape) or holding.layout.moments_by_element:
            continue
        by_block = _by_block(moments[key], saved[key])
        if not by_block.eq(by_block[:, :1]).all():
            raise ValueError(
                f"{name}: {key!r} was saved per element and differs inside a block; take it over "
                "with amsf_dist.checkpoint.import_state_dict"
            )


def _copy(holding: Holding, ours: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Copy one parameter's saved state into ours, in place, in our dtypes.

    torch's own loading would cast state to the parameter's dtype: fp32 moments of bf16 weights
    would come back rounded.
    """
    stash, lines = saved.get(STASH), holding.rule.lines
    for index in range(len(lines)):
        portable.copy_line(holding, index, ours, saved)
    in_lines = (*lines, *map(portable.scale_key, lines))
    moments = {partition.key: partition for partition in holding.partitions}
    for key, value in ours.items():
        if key in moments and holding.layout.moments_by_element:
            kernels.gather_(moments[key], saved[key].to(value).reshape(-1))
        elif key in moments and tuple(saved[key].shape) != tuple(value.shape):
            copy_into(value, _by_block(moments[key], saved[key])[:, 0].view(value.shape))
        elif key in (*holding.error_keys, COUNTER) and key not in saved:
            value.zero_()
        elif key != STASH and key not in in_lines:
            copy_into(value, saved[key])
    ours.pop(STASH, None)
    if stash is not None:
        ours[STASH] = torch.empty_like(holding.param, requires_grad=False)
        copy_into(ours[STASH], stash)


def _by_block(partition: Partition, saved: Tensor) -> Tensor:
    """[num_blocks, block_numel] of a per-element tensor that FSDP1 saved."""
    (piece,) = partition.layout.pieces
    line = whole(saved)
    if piece.part.blocks.order is not None:
        line = line.permute(piece.part.blocks.order)
    return line.reshape(piece.part.num_blocks, -1)


def _count_along(
    holdings: Sequence[Holding],
    state: Mapping[Tensor, dict[str, Any]],
    saved: Mapping[int, Mapping[str, Any] | None],
) -> None:
    """Give the group's count to parameters of which nothing lies here: FSDP1 drops their state."""
    for holding in holdings:
        if saved[id(holding.param)] or holding.layout.numel:
            continue
        for other in holdings:
            if other.group is holding.group and saved[id(other.param)]:
                for counter in holding.rule.counters:
                    state[holding.param][counter].copy_(state[other.param][counter])
                break


def _options(number: int, group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved group may change in ours, checked."""
    if saved.get("averaging", group["averaging"]) != group["averaging"]:
        raise ValueError(
            f"parameter group {number} was saved with averaging={saved['averaging']!r}, this "
            f"optimizer has {group['averaging']!r}; build it with the saved one"
        )
    changes = {key: value for key, value in saved.items() if key not in FIXED}
    known = Hyper.__dataclass_fields__
    Hyper.of({key: value for key, value in changes.items() if key in known})
    return {"train_mode": True, **changes}
