"""One optimizer-visible tensor as a kernel needs it: its memory, its blocks, its storages."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from amsf_dist.rules import Rule
from amsf_dist.shards import Layout
from amsf_dist.storage import Storage

__all__ = ["Holding", "Line"]


@dataclass(frozen=True)
class Line:
    """One of the rule's state lines: its storage, and this rank's memory of it."""

    storage: Storage
    tensors: tuple[Tensor, ...]


@dataclass
class Holding:
    """What this rank holds of one tensor, and the state beside it.

    Attributes:
        param: as the optimizer was given it.
        name: canonical, "" when unknown.
        layout: where its numbers lie.
        rule: the group's update rule.
        weight_storage: how its weights are kept.
        lines: the rule's lines, in the rule's order.
        exp_avg_sq: [num_blocks] second moments of the blocks here, a view of the state.
        decays: whether weight decay applies to it.
        index: its place in the group's counters.
        sums: [num_blocks] view of the step's block sums; [1] for element blocks, whose squares are
            used where they are made and summed only to see that all are finite.
    """

    param: Tensor
    name: str
    layout: Layout
    rule: Rule
    weight_storage: Storage
    lines: tuple[Line, ...]
    exp_avg_sq: Tensor
    decays: bool
    index: int
    sums: Tensor = field(init=False)

    @property
    def compute_dtype(self) -> torch.dtype:
        """fp32; fp64 for fp64 parameters."""
        return torch.promote_types(self.param.dtype, torch.float32)

    @property
    def elementwise(self) -> bool:
        """Whether every block is one number, so that nothing needs summing."""
        return all(piece.blocks.kind == "element" for piece in self.layout.pieces)

    @property
    def num_sums(self) -> int:
        """Length of `sums`."""
        return 1 if self.elementwise else self.layout.num_blocks

    @property
    def gradient(self) -> Tensor:
        """This rank's memory of the gradient."""
        grad = self.param.grad
        assert grad is not None
        return self.memory(grad)

    def memory(self, tensor: Tensor) -> Tensor:
        """This rank's memory of a tensor shaped and sharded as the parameter."""
        return self.layout.local(tensor.detach())
