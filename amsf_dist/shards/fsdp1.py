"""FSDP1 (`FullyShardedDataParallel`): slices of flat parameters, cut without regard to rows.

With `use_orig_params=True` the optimizer sees a 1-D slice per parameter, empty where this rank has
no part of it; with False one flat parameter per unit that holds many. Only FSDP's own (underscored,
long frozen) metadata tells which numbers they are, and only the module leads to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard

from amsf_dist.blocks import canonical_name
from amsf_dist.shards.flat import FlatSlice
from amsf_dist.shards.layout import Axis

__all__ = ["flat_slices", "is_flat", "reshard"]


def is_flat(param: Tensor) -> bool:
    """Whether FSDP1 has made this parameter part of a flat one."""
    return bool(getattr(param, "_fsdp_flattened", False))


def reshard(model: nn.Module) -> None:
    """Free gathered flat parameters, as the backward does."""
    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle = getattr(module, "_handle", None)
        started = module._is_root is not None  # FSDP sets itself up in its first forward
        if handle is not None and started and handle.uses_sharded_strategy:
            _reshard(module, handle, True)


def flat_slices(model: nn.Module) -> dict[Tensor, list[FlatSlice]]:
    """For every parameter that FSDP1 shows to an optimizer, what lies in it."""
    found: dict[Tensor, list[FlatSlice]] = {}
    names = {id(module): name for name, module in model.named_modules()}
    for module in FullyShardedDataParallel.fsdp_modules(model):
        flat: Any = module._flat_param
        if flat is None:
            continue
        slices = list(_slices(names[id(module)], module, flat))
        if flat._params is None:
            found[flat] = slices
        else:
            found.update(
                (param, [replace(part, offset=0)])
                for param, part in zip(flat._params, slices, strict=True)
            )
    return found


def _slices(prefix: str, module: Any, flat: Any) -> Iterator[FlatSlice]:
    axis = Axis(module.process_group, module.process_group.size(), flat.device.type)
    # _sharded_size is the same on every rank; with NO_SHARD it is the whole
    chunk = flat._sharded_size.numel()
    starts = [
        stop - numel
        for stop, numel, padding in zip(
            accumulate(flat._numels_with_padding),
            flat._numels_with_padding,
            flat._is_padding_mask,
            strict=True,
        )
        if not padding
    ]
    for start, fqn, shape, info in zip(
        starts, flat._fqns, flat._shapes, flat._shard_param_infos, strict=True
    ):
        numel = math.prod(shape)
        first = -(-start // chunk) * chunk
        boundaries = tuple(b - start for b in range(first, start + numel, chunk) if b > start)
        begin = info.intra_param_start_idx or 0
        end = info.intra_param_end_idx + 1 if info.in_shard else begin
        yield FlatSlice(
            name=canonical_name(f"{prefix}.{fqn}" if prefix else fqn),
            shape=tuple(shape),
            offset=info.offset_in_shard or 0,
            start=begin,
            stop=end,
            boundaries=boundaries,
            axis=axis,
            sharded=chunk < sum(flat._numels_with_padding),
            moments_by_element=True,
        )
