"""How lines in groups stand in a state dict: cut anywhere, and still readable.

Scales lie beside the codes one per group, where only this rank's layout can read them. A state dict
has them written out, one per number, laid out as the parameter; every engine knows how to cut and
gather that. It is read back into groups cut otherwise, or into another storage.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from amsf_dist import kernels
from amsf_dist.kernels import Holding
from amsf_dist.shards import copy_into
from amsf_dist.storage import Int8
from amsf_dist.storage.grouped import SCALE_DTYPE, decode

__all__ = ["copy_line", "refuse_codes_alone", "scale_key", "spread_scales", "take_line_"]


def scale_key(line: str) -> str:
    """The state dict's key of a line's scales."""
    return Int8().keys(line)[1]


def refuse_codes_alone(name: str, line: str, dtype: torch.dtype, saved: Container[str]) -> None:
    """Before a line is read.

    Raises:
        ValueError: it is in codes, and what is needed to read them is not there.
    """
    if dtype == torch.int8 and scale_key(line) not in saved:
        raise ValueError(
            f"{name}: {line!r} was saved in int8 without {scale_key(line)!r}, by a version whose "
            "codes mean something else; load it with that version and state_storage='bf16', and "
            "save it anew"
        )


def spread_scales(holding: Holding) -> dict[str, Tensor]:
    """The entries that take the place of scales in a state dict; none without groups.

    Args:
        holding: its tensors are read.

    Returns:
        key -> new bf16 tensor shaped and sharded as the parameter.
    """
    entries = {}
    for index, (name, line) in enumerate(zip(holding.rule.lines, holding.lines, strict=True)):
        if line.storage.group:
            spread = torch.zeros_like(holding.param.detach(), dtype=SCALE_DTYPE)
            memory = holding.memory(spread)
            memory.copy_(kernels.spread_scales(holding, index).view(memory.shape))
            entries[scale_key(name)] = spread
    return entries


def copy_line(
    holding: Holding, index: int, ours: Mapping[str, Any], saved: Mapping[str, Any]
) -> None:
    """Copy one line of a state dict, of any storage and sharding, into ours.

    Args:
        holding: its line is written.
        index: of the line.
        ours: entries of the parameter.
        saved: the same in the state dict.
    """
    name, line = holding.rule.lines[index], holding.lines[index]
    values, scales = saved[name], saved.get(scale_key(name))
    if scales is None and not line.storage.group:
        copy_into(ours[name], values)
        return
    like = holding.param.detach()
    here = torch.zeros_like(like, dtype=holding.compute_dtype if scales is None else torch.int8)
    copy_into(here, values)
    factors = None
    if scales is not None:
        factors = torch.zeros_like(like, dtype=SCALE_DTYPE)
        copy_into(factors, scales)
        factors = holding.memory(factors)
    take_line_(holding, index, holding.memory(here), factors)


def take_line_(holding: Holding, index: int, values: Tensor, scales: Tensor | None) -> None:
    """Take over numbers of one line.

    Args:
        holding: its line is written.
        index: of the line.
        values: laid out as this rank's memory; numbers, or int8 codes.
        scales: of the codes, bf16, laid out alike; None: they are numbers.
    """
    line = holding.lines[index]
    if scales is None:
        kernels.write_line_(holding, index, values)
    elif line.storage.group:
        line.tensors[0].copy_(values)
        kernels.gather_scales_(holding, index, scales)
    else:
        numbers = decode(values.reshape(-1, 1), scales.reshape(-1)).view(values.shape)
        kernels.write_line_(holding, index, numbers)
