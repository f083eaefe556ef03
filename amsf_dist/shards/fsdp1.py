"""FSDP1 (`FullyShardedDataParallel`): slices of flat parameters, cut without regard to rows.

With `use_orig_params=True` the optimizer sees a 1-D slice per parameter, empty where this rank has
no part of it; with False one flat parameter per unit that holds many. Only FSDP's own (underscored,
long frozen) metadata tells which numbers they are, and only the module leads to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard

from amsf_dist.blocks import canonical_name
from amsf_dist.shards.layout import Axis, Cut, Layout, Part, Piece
from amsf_dist.shards.runs import Run, box_runs

__all__ = ["FlatSlice", "flat_layout", "flat_slices", "is_flat", "reshard"]


@dataclass(frozen=True)
class FlatSlice:
    """Which interval of a parameter's line lies where in a visible tensor.

    Attributes:
        name: canonical name of the parameter.
        shape: of the whole parameter.
        offset: first number in the visible tensor.
        start: first number in the parameter's line; [start, stop) lies here.
        stop: end in the parameter's line; equal to start where nothing lies here.
        boundaries: places in the line where another rank's part begins, on any rank.
        axis: ranks that hold the rest.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    start: int
    stop: int
    boundaries: tuple[int, ...]
    axis: Axis


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
        )


def flat_layout(parts: Sequence[Part], slices: Sequence[FlatSlice]) -> Layout:
    """The layout of a visible tensor that holds these slices.

    Raises:
        ValueError: a weight that lies transposed is cut in rows: its rows are no intervals.
    """
    pieces: list[Piece] = []
    sums: list[int] = []
    slots: list[int] = []
    first_block = first_sum = num_slots = 0
    for part, here in zip(parts, slices, strict=True):
        if part.blocks.order is not None and part.blocks.kind in ("row", "head"):
            raise ValueError(
                f"{part.name} lies transposed in memory (like GPT-2's Conv1D), and FSDP1 cuts it "
                f"where its rows are not together; use FSDP2, or blocks=[{{'pattern': "
                f"{part.name!r}, 'kind': 'element'}}]"
            )
        size = part.blocks.block_numel
        runs = box_runs([math.prod(part.shape)], [here.start], [here.stop - here.start], size)
        first = here.start // size
        num_blocks = runs[0].num_blocks if runs else 0
        cut = sorted({b // size for b in here.boundaries if b % size})
        piece = Piece(
            part,
            tuple(_moved(run, here.offset, first_block - first) for run in runs),
            first_block,
            num_blocks,
            first_sum,
            len(cut),
        )
        for slot, block in enumerate(cut):
            if first <= block < first + num_blocks:
                sums.append(first_sum + block - first)
                slots.append(num_slots + slot)
        pieces.append(piece)
        first_block += num_blocks
        first_sum += piece.num_sums
        num_slots += len(cut)
    axis = slices[0].axis
    spread = any(here.boundaries for here in slices)
    return Layout(
        pieces=tuple(pieces),
        cuts=(Cut(axis, num_slots, sums, slots),) if num_slots else (),
        spread=(axis,) if spread else (),
        local=_line_of_numbers,
        first=slices[0].offset if slices[0].start == 0 < slices[0].stop else None,
        flat=True,
    )


def _moved(run: Run, offset: int, blocks: int) -> Run:
    return replace(run, offset=run.offset + offset, first_block=run.first_block + blocks)


def _line_of_numbers(tensor: Tensor) -> Tensor:
    return tensor.view(-1)
