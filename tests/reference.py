"""Clean-room references, written from the papers and as slowly and plainly as possible.

They keep x, y and z apart, never fold two formulas into one, and find block means by reshape.
Schedule-Free: arXiv 2405.15682, algorithm 1 with the AdamW update of its appendix. Adam-mini:
arXiv 2406.16793, algorithms 1 and 2: one second moment per query and key head, per row (output
neuron, token) of all other matrices; a norm is one block. (Its authors' code, and we, leave
biases to plain Adam.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["AdamMiniReference", "ScheduleFreeReference", "mean_square", "numel_per_block"]


def numel_per_block(name: str, shape: tuple[int, ...], head_dim: int) -> int:
    """The paper's partition for the names of `models.Transformer`."""
    columns = shape[-1]
    if name.endswith("bias"):
        return 1
    if "norm" in name:
        return math.prod(shape)
    if "q_proj" in name or "k_proj" in name:
        return head_dim * columns
    return columns


def mean_square(grad: Tensor, block_numel: int) -> Tensor:
    """[num_blocks, 1]: mean of grad**2 over each run of `block_numel` numbers."""
    return grad.reshape(-1, block_numel).square().mean(dim=1, keepdim=True)


class _Reference:
    """Parameters by name, their blocks, and the groups' hyper-parameters."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        block_numel: Mapping[str, int] | None = None,
        **hyper: Any,
    ) -> None:
        self.params = dict(named_parameters)
        self.block_numel = {name: (block_numel or {}).get(name, 1) for name in self.params}
        self.hyper = hyper
        self.v = {
            name: param.new_zeros(param.numel() // self.block_numel[name], 1)
            for name, param in self.params.items()
        }

    def _denominator(self, name: str, grad: Tensor, steps: int) -> Tensor:
        """sqrt(v / (1 - beta2**steps)) + eps of each block, written out for every number."""
        _, beta2 = self.hyper["betas"]
        size = self.block_numel[name]
        self.v[name] = beta2 * self.v[name] + (1 - beta2) * mean_square(grad, size)
        unbiased = self.v[name] / (1 - beta2**steps)
        root = unbiased.sqrt() + self.hyper["eps"]
        return root.expand(-1, size).reshape(grad.shape)

    def _decay(self, param: Tensor) -> float:
        only_matrices = self.hyper.get("decay", "all") == "matrices"
        return 0.0 if only_matrices and param.dim() < 2 else self.hyper["weight_decay"]


class ScheduleFreeReference(_Reference):
    """x, y and z as in the paper; the parameters hold y.

    The averaging weights are those of the authors' code: k**r * (highest lr so far)**power.
    """

    def __init__(self, named_parameters: Any, block_numel: Any = None, **hyper: Any) -> None:
        super().__init__(named_parameters, block_numel, **hyper)
        self.x = {name: param.detach().clone() for name, param in self.params.items()}
        self.z = {name: param.detach().clone() for name, param in self.params.items()}
        self.k = 0
        self.lr_max = 0.0
        self.sum_of_weights = 0.0

    @torch.no_grad()
    def step(self) -> None:
        beta1, _ = self.hyper["betas"]
        self.k += 1
        warmup_steps = self.hyper.get("warmup_steps", 0)
        lr = self.hyper["lr"] * (min(1.0, self.k / warmup_steps) if warmup_steps else 1.0)
        self.lr_max = max(self.lr_max, lr)
        weight = self.k ** self.hyper.get("r", 0.0)
        weight *= self.lr_max ** self.hyper.get("weight_lr_power", 2.0)
        self.sum_of_weights += weight
        c = weight / self.sum_of_weights if self.sum_of_weights else 0.0
        for name, y in self.params.items():
            if y.grad is None:
                continue
            update = y.grad / self._denominator(name, y.grad, self.k)
            self.z[name] = self.z[name] - lr * (update + self._decay(y) * y)
            self.x[name] = (1 - c) * self.x[name] + c * self.z[name]
            y.copy_((1 - beta1) * self.z[name] + beta1 * self.x[name])


class AdamMiniReference(_Reference):
    """AdamW with one second moment per block; steps are counted per parameter."""

    def __init__(self, named_parameters: Any, block_numel: Any = None, **hyper: Any) -> None:
        super().__init__(named_parameters, block_numel, **hyper)
        self.m = {name: torch.zeros_like(param) for name, param in self.params.items()}
        self.steps = dict.fromkeys(self.params, 0)

    @torch.no_grad()
    def step(self) -> None:
        beta1, _ = self.hyper["betas"]
        lr = self.hyper["lr"]
        for name, w in self.params.items():
            if w.grad is None:
                continue
            self.steps[name] += 1
            self.m[name] = beta1 * self.m[name] + (1 - beta1) * w.grad
            unbiased = self.m[name] / (1 - beta1 ** self.steps[name])
            update = unbiased / self._denominator(name, w.grad, self.steps[name])
            w.copy_(w - lr * self._decay(w) * w - lr * update)
