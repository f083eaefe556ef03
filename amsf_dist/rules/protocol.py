"""What a rule must say and do. No devices, no dtypes, no sharding: only + - * and short vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Coefficients", "Rule", "Scalar"]

Scalar = float | Tensor
"""A number on the host, or a 0-dim tensor on the device that holds the weights."""

Coefficients = Any
"""A NamedTuple of the rule's own: one field per scalar its element-wise arithmetic needs."""


class Rule(Protocol):
    """One published update, written once for every storage, sharding and kernel.

    Attributes:
        name: the value of `averaging=` that selects it.
        lines: state with one number per element; all start at zero.
        counters: state with one number per parameter (fp64); all start at zero. "step" comes first.
        averaged: whether evaluation weights x differ from training weights y.
        ticks_without_gradient: whether a parameter's counters advance in a step in which it got no
            gradient (schedulefree counts steps per group, torch.optim per parameter).
    """

    name: str
    lines: tuple[str, ...]
    counters: tuple[str, ...]
    averaged: bool
    ticks_without_gradient: bool

    def advance(
        self, counters: Mapping[str, Tensor], tick: Tensor, group: Mapping[str, Any]
    ) -> Coefficients:
        """Advance the counters in place and give this step's scalars.

        Args:
            counters: name -> [num_params] fp64.
            tick: [num_params] fp64, 1 where the parameter steps now, 0 where it stands still.
            group: the hyper-parameters.

        Returns:
            A NamedTuple whose fields are [num_params] fp64 tensors, or floats equal for all.
        """
        ...

    def told(self, counters: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, Tensor]:
        """For people who look: "lr" after warm-up, and what else tells how the last step went.

        Args:
            counters: as they stand after it; see `advance`.
            group: the hyper-parameters.

        Returns:
            Name -> [num_params] fp64.
        """
        ...

    def part(self, c: Coefficients, first: bool, last: bool, begun: Scalar) -> Coefficients:
        """The scalars for one part of a step whose gradient comes in parts, added into the state.

        Args:
            c: of the whole step: columns as `advance` gives them.
            first: whether nothing of the step has been added yet.
            last: whether nothing will follow.
            begun: 1 where the parameter has done a step before this one, else 0: until then there
                is no second moment to go by.
        """
        ...

    def block_scale(
        self, exp_avg_sq: Tensor, mean_sq: Tensor, c: Coefficients
    ) -> tuple[Tensor, Tensor]:
        """New second moment and the factor of the gradient, for some blocks.

        Rows, columns and the whole of a factored matrix are asked for one by one; the factor of an
        element is that of its row times that of its column, divided by that of the whole.

        Args:
            exp_avg_sq: [num_blocks], the moment so far.
            mean_sq: [num_blocks], mean of the squared gradient over each block, this step.
            c: the parameter's scalars.

        Returns:
            (exp_avg_sq, scale), both [num_blocks].
        """
        ...

    def move(
        self,
        weight: Tensor,
        grad: Tensor,
        scale: Tensor,
        lines: tuple[Tensor, ...],
        decays: bool,
        c: Coefficients,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """New weights and lines of a tile; element-wise, only + - *.

        Args:
            weight: [num_blocks, numel_per_block], the weights y.
            grad: same shape.
            scale: [num_blocks, 1], from `block_scale`, or the shape of weight (factored).
            lines: same shape as weight, in the order of `self.lines`.
            decays: whether weight decay applies to this parameter.
            c: the parameter's scalars.
        """
        ...

    def to_x(self, weight: Tensor, lines: tuple[Tensor, ...], group: Mapping[str, Any]) -> Tensor:
        """Evaluation weights x from training weights y."""
        ...

    def to_y(self, weight: Tensor, lines: tuple[Tensor, ...], group: Mapping[str, Any]) -> Tensor:
        """Training weights y from evaluation weights x, right to rounding."""
        ...
