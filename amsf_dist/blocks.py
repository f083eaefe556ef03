"""Block rules: how the line of one parameter is cut into equal blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from amsf_dist.architecture import Facts
from amsf_dist.names import HEAD_ROLES, canonical_name, may_be_transposed, role_of
from amsf_dist.patterns import KINDS, check, check_head_dim, unmatched_patterns

__all__ = ["KINDS", "Blocks", "canonical_name", "check", "resolve", "unmatched_patterns"]

# Roles whose weights have their outputs on dim 0 (of the permuted weight); others on all but the
# last, so that a stack of matrices gives one row of one matrix.
_OUTPUTS_FIRST = ("linear", "value", "query_key", "fused_qkv", "convolution")
_PASS_NAMES = "pass model.named_parameters() or the model instead of model.parameters()"
_NO_NAME = f"not recognised: no name; {_PASS_NAMES}"


@dataclass(frozen=True)
class Blocks:
    """How one parameter's line is cut.

    Attributes:
        kind: `"element"`, `"row"`, `"head"`, `"tensor"` or `"factored"` (rows); in `others` also
            `"column"` and `"mean"` (the whole, its one moment kept by all ranks).
        block_numel: elements per block; divides numel (1 where numel is 0).
        order: permutation of the dims whose row-major order is the line; None = as stored.
        note: why, when the parameter was not recognised or fell back; shown by `explain`.
        others: further ways in which the same numbers are cut at the same time.
    """

    kind: str
    block_numel: int
    order: tuple[int, ...] | None = None
    note: str = ""
    others: tuple[Blocks, ...] = ()

    def num_blocks(self, shape: Sequence[int]) -> int:
        """Blocks of a parameter of this (global) shape."""
        return math.prod(shape) // self.block_numel


@dataclass(frozen=True)
class _Parameter:
    """One parameter as the rules see it; `head_dim` is the user's word, `facts` the model's."""

    name: str | None
    shape: tuple[int, ...]
    facts: Facts
    head_dim: int | None

    def __str__(self) -> str:
        return f"parameter {self.name or '<no name>'!r} of shape {self.shape}"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Output rows: the equal runs of the line that a linear layer calls neurons."""
        order = self.facts.order
        line = tuple(self.shape[dim] for dim in order) if order else self.shape
        if len(line) < 2:
            return self.numel
        if self.facts.role in _OUTPUTS_FIRST:
            return line[0] * self.facts.groups
        return math.prod(line[:-1])


def resolve(
    blocks: Any,
    name: str | None,
    shape: Sequence[int],
    *,
    facts: Facts | None = None,
    head_dim: int | None = None,
) -> Blocks:
    """Decide the blocks of one parameter.

    Args:
        blocks: the `blocks=` argument, see `check`.
        name: fully qualified name, wrapper prefixes allowed; None for a plain parameter.
        shape: global shape (before sharding).
        facts: what the owning module says; without it only the name and the shape speak.
        head_dim: rows per attention head, given by the user; wins over the facts.

    Raises:
        TypeError: `blocks` or `head_dim` has the wrong type.
        ValueError: the blocks cannot be decided: heads of unknown size under `"adam_mini"`, a
            given `head_dim` that does not divide the rows, or a rule by name without a name.
    """
    rules = check(blocks)
    if head_dim is not None:
        check_head_dim("head_dim", head_dim)
    shape = tuple(int(size) for size in shape)
    name = None if name is None else canonical_name(name)
    kind = rules
    if isinstance(rules, list):
        if rules and name is None:
            raise ValueError(
                f"blocks is a list of name patterns and a parameter of shape {shape} has no name; "
                f"{_PASS_NAMES}"
            )
        rule = next((rule for rule in rules if re.search(rule["pattern"], str(name))), {})
        kind = rule.get("kind", "auto")
        head_dim = rule.get("head_dim", head_dim)
    if facts is None:
        if kind == "adam_mini" and name is None and len(shape) >= 2:
            raise ValueError(
                f"blocks='adam_mini' goes by parameter names and a parameter of shape {shape} has "
                f"none; {_PASS_NAMES}"
            )
        facts = _facts_from_name(name, shape)
    return _by_kind(str(kind), _Parameter(name, shape, facts, head_dim))


def _facts_from_name(name: str | None, shape: tuple[int, ...]) -> Facts:
    role = role_of(name or "", len(shape))
    if may_be_transposed(name or "", shape):
        note = "stored [out, in] or [in, out] (GPT-2's Conv1D)? pass the model; taken as [out, in]"
        return Facts("linear", note=note)
    if role == "experts":
        note = "stored [.., out, in] or [.., in, out]? pass the model; taken as [.., out, in]"
        return Facts(role, note=note)
    if role == "convolution" and shape[0] == 1 and "conv" not in (name or "").lower():
        return Facts("other")  # a convolution of one channel would be one block per tensor
    return Facts(role)


def _by_kind(kind: str, param: _Parameter) -> Blocks:
    if kind == "element":
        return Blocks("element", 1)
    if kind == "tensor":
        return _tensor(param)
    if kind == "row":
        return _row(param)
    if kind == "head":
        return _head(param, strict="kind 'head'")
    if kind == "factored":
        return _factored(param)
    return _by_role(kind, param)


def _by_role(kind: str, param: _Parameter) -> Blocks:
    """Adam-mini's partition, and `"auto"`, which differs in vectors and in what it forgives."""
    role, note, ndim = param.facts.role, param.facts.note, len(param.shape)
    adam_mini = kind == "adam_mini"
    if role == "bias" or (not adam_mini and (role == "norm" or ndim < 2)):
        return Blocks("element", 1)
    if role == "norm":
        return _tensor(param)
    if ndim < 2:
        # Without a name a bias cannot be told from a norm, and single elements suit both.
        if param.name is None:
            return Blocks("element", 1, note=_NO_NAME)
        return replace(_tensor(param), note="not recognised: one block, as in Adam-mini")
    if role in HEAD_ROLES:
        return _head(param, strict="blocks='adam_mini'" if adam_mini else "")
    blocks = _row(param)
    if role == "other" and not note:
        said = "neither module nor name says what it is; one row per block"
        note = _NO_NAME if param.name is None else f"not recognised: {said}"
    return replace(blocks, note=note)


def _row(param: _Parameter) -> Blocks:
    return _runs("row", param, 1, param.facts.note)


def _factored(param: _Parameter) -> Blocks:
    """Rows, columns and the whole of a matrix (docs/algorithm.md (12) to (14)); the rest as "auto".

    A stack of matrices is one matrix, with its rows over those of all.
    """
    role, shape, rows = param.facts.role, param.shape, param.rows
    if role in ("bias", "norm") or len(shape) < 2:
        return _by_role("auto", param)
    if not param.numel:
        return _row(param)
    columns = param.numel // rows
    if rows == 1 or columns == 1:  # a vector in two dims
        return Blocks("element", 1)
    order = param.facts.order or tuple(range(len(shape)))
    leading = 1 if role in _OUTPUTS_FIRST else len(shape) - 1
    if math.prod(shape[dim] for dim in order[:leading]) != rows:
        return replace(_row(param), note="rows are no dims of it: not factored, one row per block")
    # which dim of a matrix holds the rows makes no difference, and more dims seldom stay unknown
    note = "" if len(shape) == 2 else _by_role("auto", param).note
    swapped = (*order[leading:], *order[:leading])
    others = Blocks("column", rows, swapped), Blocks("mean", param.numel)
    return Blocks("factored", columns, param.facts.order, note, others)


def _tensor(param: _Parameter) -> Blocks:
    return Blocks("tensor", max(param.numel, 1))


def _head(param: _Parameter, strict: str) -> Blocks:
    """One block per head; where the heads are not known, rows, or an error if `strict` asks."""
    rows = param.rows
    if param.head_dim is not None:
        if rows % param.head_dim:
            raise ValueError(
                f"head_dim={param.head_dim} does not divide the {rows} rows of {param}; pass the "
                "rows per head, or a rule for this one, e.g. blocks=[{'pattern': "
                f"{re.escape(param.name or '...')!r}, 'kind': 'row'}}]"
            )
        return _runs("head", param, param.head_dim, param.facts.note)
    read = param.facts.head_dim
    if read is not None and rows % read == 0:
        return _runs("head", param, read, param.facts.note)
    if read is not None:
        reason = f"head_dim {read}, read from the model, does not divide its {rows} rows"
    else:
        reason = param.facts.note or "head_dim is not known"
    if strict:
        raise ValueError(
            f"{strict} needs rows per head for {param}: {reason}; pass head_dim=, or the model "
            "instead of its parameters"
        )
    return _runs("row", param, 1, f"{reason}: one row per block")


def _runs(kind: str, param: _Parameter, rows_per_block: int, note: str) -> Blocks:
    numel = param.numel
    block_numel = numel // param.rows * rows_per_block if numel else 1
    return Blocks(kind, block_numel, param.facts.order, note)
