"""Saved weights, of 32 or 16 bits and with or without error bits, into those of an engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amsf_dist.integrations.deepspeed.saved import WEIGHT, Saved
from amsf_dist.kernels import Holding
from amsf_dist.state import STASH
from amsf_dist.storage import Storage, weight_storage

__all__ = ["copy_weights"]


def copy_weights(
    holding: Holding, state: dict[str, Any], record: dict[str, Any], saved: Saved
) -> None:
    """Copy one parameter's part.

    Args:
        holding: its parameter, what lies beside it and, in eval mode, the exact y are written.
        state: of the tensor.
        record: of the parameter, from `describe`.
        saved: has it.
    """
    name, start, stop = record["name"], record["start"], record["stop"]
    here = slice(record["offset"], record["offset"] + stop - start)
    group, lines = saved.groups[saved.group_of[name]], saved.fragments[name][0].lines
    weights = holding.memory(holding.param).view(-1)[here]
    saved.read(name, WEIGHT, start, stop, weights)

    # error bits belong to y: to the stash where the weights are x
    key, target = WEIGHT, weights
    if not group["train_mode"] and STASH in lines:
        stash: Tensor = state.setdefault(STASH, torch.zeros_like(holding.param.detach()))
        key, target = STASH, holding.memory(stash).view(-1)[here]
        saved.read(name, STASH, start, stop, target)
    elif group["train_mode"]:
        state.pop(STASH, None)
    errors = [error.view(-1)[here] for error in holding.errors]

    theirs = weight_storage(group.get("weight_storage", "auto"), lines[key].dtype)
    if theirs == holding.weight_storage:
        for error_key, error in zip(holding.error_keys, errors, strict=True):
            error.zero_()  # weights saved without error bits are those weights
            saved.read(name, error_key, start, stop, error)
        return
    exact = _read(theirs, name, key, start, stop, saved)
    holding.weight_storage.store((target, *errors), slice(0, stop - start), exact)


def _read(theirs: Storage, name: str, key: str, start: int, stop: int, saved: Saved) -> Tensor:
    """Numbers [start, stop) of a parameter as their storage reads them, fp32."""
    lines, tensors = saved.fragments[name][0].lines, []
    like = torch.empty(stop - start, dtype=lines[key].dtype)
    beside = theirs.beside(WEIGHT, like)
    for entry, zeros in {key: torch.zeros_like(like), **beside}.items():
        saved.read(name, entry, start, stop, zeros)
        tensors.append(zeros)
    return theirs.load(tuple(tensors), slice(0, stop - start), torch.float32)
