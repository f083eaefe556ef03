"""DeepSpeed's ZeRO: what lies in the tensors that its optimizer wrappers show to an optimizer.

Wrappers are told apart by what they have, not by their class or version. Offsets are worked out
from the order and the sizes in which they flatten parameters; the mapping that they keep for
themselves (`_hp_mapping`) is wrong with `round_robin_gradients`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch.distributed as dist
from torch import Tensor

from amsf_dist.blocks import canonical_name
from amsf_dist.shards.flat import FlatSlice
from amsf_dist.shards.layout import Axis

__all__ = ["Visible", "is_partitioned", "visible_tensors"]


@dataclass(frozen=True)
class Visible:
    """One tensor that a wrapper shows to the optimizer.

    Attributes:
        group: number of its parameter group.
        tensor: fp32 partition (ZeRO-1 to 3), fp32 copy (half precision without ZeRO) or parameter.
        weights: what the model uses in place of it, where that is one tensor (without ZeRO).
        name: of the parameter, where it is one.
        slices: of the parameters in it, where it is a partition.
    """

    group: int
    tensor: Tensor
    weights: Tensor | None = None
    name: str = ""
    slices: tuple[FlatSlice, ...] = ()


def is_partitioned(param: Tensor) -> bool:
    """Whether `deepspeed.zero.Init` has taken this parameter's numbers away."""
    return hasattr(param, "ds_id")


def visible_tensors(
    wrapper: Any, names: Mapping[Tensor, str], device_type: str
) -> list[list[Visible]]:
    """What the wrapper shows, in the lists that it shows at a time.

    Args:
        wrapper: `engine.optimizer`.
        names: of the model's parameters.
        device_type: where the collectives of its process groups want their tensors.
    """
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return [[flat] for flat in _stage_3(wrapper, names, device_type)]
    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        groups = wrapper.round_robin_bit16_groups
        flats = wrapper.single_partition_of_fp32_groups
        # before 0.19.8 nothing stood between the parameters
        offsets = getattr(wrapper, "round_robin_bit16_offsets", None) or [
            _offsets(g) for g in groups
        ]
        return [[flat] for flat in _stage_1_2(wrapper, groups, offsets, flats, names, device_type)]
    if hasattr(wrapper, "fp32_groups_flat_partition"):
        groups, flats = wrapper.bf16_groups, wrapper.fp32_groups_flat_partition
        offsets = [_offsets(group) for group in groups]
        return [list(_stage_1_2(wrapper, groups, offsets, flats, names, device_type))]
    return [list(_without_zero(wrapper, names))]


def _stage_3(wrapper: Any, names: Mapping[Tensor, str], device_type: str) -> Iterator[Visible]:
    """Every parameter is cut by itself; a flat tensor holds this rank's part of several."""
    for number, (params, flat) in enumerate(
        zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True)
    ):
        axis = _axis(params[0].ds_process_group, device_type)
        rank, slices, offset = dist.get_rank(axis.group), [], 0
        for param in params:
            numel, chunk = param.ds_numel, param.ds_tensor.ds_numel
            start = min(rank * chunk, numel)
            slices.append(
                FlatSlice(
                    name=canonical_name(names[param]),
                    shape=tuple(param.ds_shape),
                    offset=offset,
                    start=start,
                    stop=min(start + chunk, numel),
                    boundaries=tuple(range(chunk, numel, chunk)),
                    axis=axis,
                )
            )
            offset += chunk
        yield Visible(wrapper.sub_group_to_group_id[number], flat, slices=tuple(slices))


def _stage_1_2(
    wrapper: Any,
    groups: Sequence[Sequence[Tensor]],
    offsets: Sequence[Sequence[int]],
    flats: Sequence[Tensor],
    names: Mapping[Tensor, str],
    device_type: str,
) -> Iterator[Visible]:
    """A group's parameters lie one after another in a line, which is cut in equal parts."""
    for number, (params, starts, flat) in enumerate(zip(groups, offsets, flats, strict=True)):
        axis, chunk = _axis(wrapper.real_dp_process_group[number], device_type), flat.numel()
        first = dist.get_rank(axis.group) * chunk
        slices = []
        for param, start in zip(params, starts, strict=True):
            numel = param.numel()
            begin, end = (min(max(place - start, 0), numel) for place in (first, first + chunk))
            boundaries = range(-start % chunk, numel, chunk)
            slices.append(
                FlatSlice(
                    name=canonical_name(names[param]),
                    shape=tuple(param.shape),
                    offset=max(start - first, 0),
                    start=begin,
                    stop=end,
                    boundaries=tuple(place for place in boundaries if place),
                    axis=axis,
                )
            )
        yield Visible(number, flat, slices=tuple(slices))


def _without_zero(wrapper: Any, names: Mapping[Tensor, str]) -> Iterator[Visible]:
    if hasattr(wrapper, "fp32_groups"):
        for number, (model, masters) in enumerate(
            zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        ):
            for param, master in zip(model, masters, strict=True):
                yield Visible(number, master, weights=param, name=names[param])
        return
    for number, group in enumerate(wrapper.param_groups):
        for param in group["params"]:
            yield Visible(number, param, weights=param, name=names[param])


def _axis(group: Any, device_type: str) -> Axis:
    return Axis(group, dist.get_world_size(group), device_type)


def _offsets(params: Sequence[Tensor]) -> list[int]:
    return [0, *accumulate(param.numel() for param in params)][:-1]
