"""A full state dict from one engine, made to fit another.

State is the same everywhere but for one form: FSDP1 can only save and load state that is as large
as its parameter, so under it block moments stand once per element, elsewhere once per block.
torch's loading functions look at shapes before our optimizer sees the state dict; this comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from amsf_dist.blocks import Blocks, canonical_name
from amsf_dist.loading import moment_keys
from amsf_dist.optimizer import AMSF
from amsf_dist.shards import Part, line_shape, vector_shape
from amsf_dist.state import MOMENT, MOMENTS

__all__ = ["convert_state_dict"]


def convert_state_dict(state_dict: Mapping[str, Any], optimizer: AMSF) -> dict[str, Any]:
    """Give a full optimizer state dict the form that the optimizer's engine loads.

    Args:
        state_dict: whole tensors, keyed by parameter name, as `get_optimizer_state_dict` with
            `full_state_dict=True` and `FSDP.optim_state_dict` give it, or by number with
            "param_names" in its groups. Empty on ranks that receive theirs by broadcast.
        optimizer: that will load it: under FSDP1, or anything else.

    Returns:
        A new state dict; only block moments of another form are new tensors.

    Raises:
        ValueError: a moment has neither form, so it was saved with other blocks or another model.
    """
    if not state_dict:
        return {}
    parts = {part.name: part for part in optimizer.parts}
    flat = [h for h in optimizer.holdings if h.layout.moments_by_element]
    keys = moment_keys(flat) if flat else None
    names = _names(state_dict)
    state = {
        key: _converted(parts[names[key]], entries, keys) if names.get(key) in parts else entries
        for key, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _names(state_dict: Mapping[str, Any]) -> dict[Any, str]:
    """Key in "state" -> parameter name."""
    names: dict[Any, str] = {}
    for group in state_dict["param_groups"]:
        names.update(zip(group["params"], group.get("param_names", ()), strict=False))
    names.update((key, key) for key in state_dict["state"] if isinstance(key, str))
    return {key: canonical_name(name) for key, name in names.items()}


def _converted(
    part: Part, entries: Mapping[str, Any], flat: Sequence[str] | None
) -> dict[str, Any]:
    """The state of one parameter.

    Args:
        part: it.
        entries: its saved state.
        flat: under FSDP1 the moments that any parameter has: it wants the same of all; else None.
    """
    if MOMENT not in entries:
        return dict(entries)
    converted = {key: value for key, value in entries.items() if key not in MOMENTS}
    for key, blocks in zip(MOMENTS, (part.blocks, *part.blocks.others), strict=False):
        if key in entries:
            which = f"{part.name}: {key!r}"
            converted[key] = _moment(which, part.shape, blocks, entries[key], flat is not None)
    for key in flat or ():
        if key not in converted and key != MOMENT:
            converted[key] = torch.zeros_like(converted[MOMENT])
    return converted


def _moment(
    which: str, shape: tuple[int, ...], blocks: Blocks, moment: Tensor, flat: bool
) -> Tensor:
    vector, saved = vector_shape(shape, blocks), tuple(moment.shape)
    if saved not in (vector, shape):
        raise ValueError(
            f"{which} was saved with shape {saved}, neither {vector} (per block) nor {shape} (per "
            "element); build the optimizer with the blocks= of then"
        )
    line, order = line_shape(shape, blocks), blocks.order
    if flat and saved == vector:
        moment = moment.reshape(-1, 1).expand(-1, blocks.block_numel).reshape(line)
        if order is not None:
            moment = moment.permute([order.index(dim) for dim in range(len(order))])
    elif not flat and saved != vector:
        moment = moment if order is None else moment.permute(order)
        moment = moment.reshape(blocks.num_blocks(shape), -1)[:, 0].reshape(vector)
    # a broadcast reads memory as it lies, also where a view repeats or skips it
    return moment.contiguous()
