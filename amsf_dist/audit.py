"""The block table: what AMSF makes of a model, parameter by parameter, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amsf_dist import blocks as block_rules
from amsf_dist.architecture import read_architecture
from amsf_dist.groups import cut_lines, trainable
from amsf_dist.hyper import Hyper
from amsf_dist.kernels import Holding
from amsf_dist.kernels.grouping import num_groups
from amsf_dist.rules import RULES
from amsf_dist.shards import Layout, flats_of, locate, on_paper
from amsf_dist.state import STASH, WEIGHT
from amsf_dist.storage import state_storage, weight_storage
from amsf_dist.storage.grouped import SCALE_DTYPE

__all__ = ["Explanation", "Row", "explain", "explain_holdings", "memory"]


@dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        name: canonical, "" when unknown.
        shape: of the whole parameter.
        kind: of its blocks.
        blocks: how many it has in all.
        cut_blocks: how many of them are summed over ranks in every step.
        state_bytes: of its lines and moments on this rank.
        note: why a block rule was not the expected one; "" when it was.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    blocks: int
    cut_blocks: int
    state_bytes: int
    note: str = ""


@dataclass(frozen=True)
class Explanation:
    """Rows in the order of the parameters; `str()` is a table."""

    rows: tuple[Row, ...]

    @property
    def cut_blocks(self) -> int:
        """Numbers that a step adds up over ranks."""
        return sum(row.cut_blocks for row in self.rows)

    @property
    def not_recognised(self) -> tuple[Row, ...]:
        """Rows with a note."""
        return tuple(row for row in self.rows if row.note)

    def __str__(self) -> str:
        """The table."""
        head = ("parameter", "shape", "blocks", "kind", "cut", "state bytes", "note")
        body = [
            (
                row.name or "(no name)",
                " x ".join(map(str, row.shape)) or "scalar",
                f"{row.blocks:,}",
                row.kind,
                f"{row.cut_blocks:,}",
                f"{row.state_bytes:,}",
                row.note,
            )
            for row in self.rows
        ]
        numel = sum(math.prod(row.shape) for row in self.rows)
        total = (
            f"{len(self.rows)} parameters",
            f"{numel:,}",
            f"{sum(row.blocks for row in self.rows):,}",
            "",
            f"{self.cut_blocks:,}",
            f"{sum(row.state_bytes for row in self.rows):,}",
            "",
        )
        return _table([head, *body, total], right=(2, 4, 5))


def explain(
    model: nn.Module, *, mesh: int | Sequence[int] | None = None, **amsf_kwargs: Any
) -> Explanation:
    """How `AMSF(model, **amsf_kwargs)` would cut every trainable parameter. Allocates nothing.

    Args:
        model: plain, on the meta device, or sharded (then "cut" and the bytes are this rank's).
        mesh: for a plain model: what would be cut, and what the first rank would hold, if FSDP2
            sharded it over so many ranks (or (replicas, ranks) for HSDP). Needs no processes.
        **amsf_kwargs: arguments of `AMSF`.

    Raises:
        TypeError, ValueError: as `AMSF` does.
    """
    hyper = Hyper.of(amsf_kwargs)
    named = trainable(model)
    group = {
        **hyper.as_group(),
        "params": [param for _, param in named],
        "param_names": [name for name, _ in named],
    }
    block_rules.check(hyper.blocks)
    flats = flats_of(model)
    storage, lines = hyper.state_storage, RULES[hyper.averaging].lines
    rows: list[Row] = []
    for (_, param), parts in zip(
        named, cut_lines(group, read_architecture(model), flats), strict=True
    ):
        one = torch.empty(1, dtype=param.dtype, device="meta")
        kept = state_storage(storage, param.dtype)
        line = kept.allocate("line", one).values()
        weights = weight_storage(hyper.weight_storage, param.dtype)
        errors = weights.beside(WEIGHT, one).values()
        if mesh is None:
            layout = locate(parts, param, flats)
        else:
            (part,) = parts
            layout = on_paper(part, [mesh] if isinstance(mesh, int) else mesh)
        per_number = len(lines) * sum(map(_bytes, line)) + sum(map(_bytes, errors))
        rows += _rows(layout, param, per_number, len(lines) if kept.group else 0)
    return Explanation(tuple(rows))


def explain_holdings(holdings: Sequence[Holding]) -> Explanation:
    """The table of a built optimizer."""
    rows: list[Row] = []
    for holding in holdings:
        tensors = [tensor for line in holding.lines for tensor in line.by_number]
        per_number = sum(tensor.element_size() for tensor in (*tensors, *holding.errors))
        grouped = sum(bool(line.storage.group) for line in holding.lines)
        rows += _rows(holding.layout, holding.param, per_number, grouped)
    return Explanation(tuple(rows))


def memory(
    holdings: Sequence[Holding], state: Mapping[Tensor, Mapping[str, Any]]
) -> dict[str, int]:
    """Bytes on this rank by owner.

    Returns:
        "weights"; "error_bits" of compensated weights; one entry per line of the rule ("gap" or
        "exp_avg"); "v", the block moments; "y", exact training weights kept in eval mode; "total".
    """
    owners = {"weights": 0, "error_bits": 0}
    for holding in holdings:
        owners["weights"] += _bytes(holding.memory(holding.param))
        owners["error_bits"] += sum(map(_bytes, holding.errors))
        for name, line in zip(holding.rule.lines, holding.lines, strict=True):
            owners[name] = owners.get(name, 0) + sum(map(_bytes, line.tensors))
        moments = sum(_bytes(partition.moments) for partition in holding.partitions)
        owners["v"] = owners.get("v", 0) + moments
        if STASH in state[holding.param]:
            stash = holding.memory(state[holding.param][STASH])
            owners["y"] = owners.get("y", 0) + _bytes(stash)
    owners["total"] = sum(owners.values())
    return owners


def _rows(layout: Layout, param: Tensor, per_number: int, grouped: int) -> Iterator[Row]:
    """Rows of one tensor.

    Args:
        layout: of the tensor.
        param: the tensor.
        per_number: bytes of its state per number.
        grouped: how many of its lines have a scale per group.
    """
    moment_bytes = torch.promote_types(param.dtype, torch.float32).itemsize
    for piece in layout.pieces:
        part, all_ways = piece.part, (piece, *piece.others)
        here = sum(cut.num_blocks for cut in all_ways)
        yield Row(
            name=part.name,
            shape=part.shape,
            kind=part.blocks.kind,
            blocks=sum(cut.part.num_blocks for cut in all_ways),
            cut_blocks=sum(cut.cut_blocks for cut in all_ways),
            state_bytes=piece.numel * per_number
            + here * moment_bytes
            + (grouped and grouped * num_groups(piece) * SCALE_DTYPE.itemsize),
            note=part.blocks.note,
        )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _table(lines: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
