"""Which tensors the Triton kernels step, and which of their numbers lie together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.triton.arithmetic import SCALARS
from amsf_dist.shards import Piece
from amsf_dist.shards.runs import Run, contiguous_runs
from amsf_dist.storage import Int8, Plain, Storage
from amsf_dist.storage.grouped import GROUP
from amsf_dist.storage.kahan import Kahan
from amsf_dist.storage.split import Split
from amsf_dist.storage.stochastic import Stochastic

__all__ = ["ALIGNED", "FORMATS", "FP32", "Stretch", "storages", "stretches"]

FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""What memory.py calls a dtype."""

ALIGNED = 16
"""Numbers, and bytes of addresses: a thread then reads 16 bytes at once."""

FP32 = 4
"""Bytes."""

_LARGEST_BLOCK = 2**30  # positions in a block are counted in 32 bits
_MANY = 16  # stretches of one piece: more would be a table of tiny tiles


class Stretch(NamedTuple):
    """Numbers that are contiguous in memory and, where it matters, in the parameter's line.

    Attributes:
        start: in this rank's memory of the tensor.
        numel: how many.
        place: of the first in the parameter's line.
        run: they are part of.
        group: of the first, in the line's scales.
    """

    start: int
    numel: int
    place: int
    run: Run
    group: int


def _weight_name(storage: Storage) -> str | None:
    """What memory.py calls a storage of weights; None: nothing."""
    if isinstance(storage, Split):
        return f"split{storage.bits}"
    if isinstance(storage, Kahan):
        return "kahan"
    if isinstance(storage, Plain) and storage.dtype in FORMATS:
        return "stochastic" if isinstance(storage, Stochastic) else "plain"
    return None


def _line_name(storage: Storage) -> str | None:
    """What memory.py calls a storage of lines; None: nothing."""
    if isinstance(storage, Int8):
        return "int8"
    if isinstance(storage, Stochastic) and storage.dtype == torch.bfloat16:
        return "bf16"
    return "fp32" if type(storage) is Plain and storage.dtype == torch.float32 else None


def storages(holding: Holding) -> tuple[str, str] | None:
    """Of weights (with the format) and of the line, if memory.py knows them."""
    known = holding.rule.name in SCALARS and len(holding.lines) == 1
    if not known or holding.exp_avg_sq.dtype != torch.float32:
        return None
    weight, line = _weight_name(holding.weight_storage), _line_name(holding.lines[0].storage)
    if weight is None or line is None or holding.param.dtype not in FORMATS:
        return None
    state = [*holding.errors, *holding.lines[0].by_number]
    if not all(tensor.is_contiguous() for tensor in [*state, holding.memory(holding.param)]):
        return None
    return f"{weight} {FORMATS[holding.param.dtype]}", line


def stretches(holding: Holding) -> list[list[Stretch]] | None:
    """Of every piece; None where the reference has to step the tensor.

    That is where memory lies in another order than the line (transposed weights), where rounding
    at random or groups meet a box of a matrix (`Shard(1)`), where a group lies here in part, and
    where a factored matrix lies here in parts of rows.
    """
    weight, line = _weight_name(holding.weight_storage), _line_name(holding.lines[0].storage)
    flat = holding.memory(holding.param).dim() == 1
    found: list[list[Stretch]] = []
    groups = 0
    for piece in holding.layout.pieces:
        order = piece.part.blocks.order
        if piece.boxes or not (order is None or flat) or not _by_rows(piece):
            return None
        if any(run.block_numel >= _LARGEST_BLOCK for run in piece.runs):
            return None
        if line != "fp32" or weight == "stochastic":
            here = list(_in_line(piece, groups))
            if line == "int8" and not all(_whole_groups(piece, part) for part in here):
                return None
        else:
            here = [Stretch(run.offset, run.numel, 0, run, 0) for run in piece.runs]
        if len(here) > _MANY:
            return None
        if line == "int8":
            groups += sum(-(-part.numel // GROUP) for part in here)
        found.append(here)
    return found


def _in_line(piece: Piece, groups: int) -> Iterator[Stretch]:
    """Where runs and what is contiguous in the line overlap."""
    for span in piece.spans:
        for part in contiguous_runs(span.shape, span.offsets, span.lengths, GROUP):
            start = span.position + part.offset
            for run in piece.runs:
                low = max(start, run.offset)
                high = min(start + part.numel, run.offset + run.numel)
                if low < high:
                    yield Stretch(low, high - low, piece.place(low), run, groups)
                    groups += -(-(high - low) // GROUP)


def _by_rows(piece: Piece) -> bool:
    """Whether it lies here in whole rows, if it is factored."""
    if not piece.others:
        return True
    length = piece.others[0].num_blocks
    return length == piece.part.blocks.block_numel and all(
        run.whole and run.block_numel == length for run in piece.runs
    )


def _whole_groups(piece: Piece, part: Stretch) -> bool:
    stop = part.place + part.numel
    ends = stop % GROUP == 0 or stop == math.prod(piece.part.shape)
    return part.place % GROUP == 0 and ends
