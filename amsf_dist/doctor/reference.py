"""What three steps should do, in fp64, written from the papers as plainly as possible.

x, y and z are kept apart, no two formulas are folded into one, and nothing of the optimizer's
arithmetic is used: of the package only the rule that says which numbers form a block.
Schedule-Free: arXiv 2405.15682, algorithm 1 over AdamW; averaging weights as in its authors' code.
Blocks: Adam-mini, arXiv 2406.16793, one second moment for each.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amsf_dist.architecture import read_architecture
from amsf_dist.blocks import canonical_name, resolve
from amsf_dist.doctor.model import TinyModel, loss_of

__all__ = ["Compute", "Reference", "gradients"]


@dataclass(frozen=True)
class Compute:
    """How a wrapper runs forward and backward.

    Attributes:
        dtype: None: fp32, which the reference takes in fp64.
        cast: the weights that forward uses are in `dtype`, not in fp32.
        autocast: forward runs under torch.autocast to `dtype`.
        loss_scale: the loss is multiplied by it, and the gradient divided.
    """

    dtype: torch.dtype | None = None
    cast: bool = False
    autocast: bool = False
    loss_scale: float = 1.0

    @property
    def is_exact(self) -> bool:
        """Whether gradients differ from those in fp64 by fp32 rounding alone."""
        return self.dtype is None

    def __str__(self) -> str:
        """As people say it."""
        if self.dtype is None:
            return "fp32"
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        return f"{name} autocast" if self.autocast and not self.cast else name


def gradients(
    model: TinyModel, weights: Mapping[str, Tensor], parts: Sequence[Tensor], compute: Compute
) -> dict[str, Tensor]:
    """The gradient of a step: the mean over all micro-batches of all ranks.

    In half precision the forward and backward of a micro-batch round as the wrapper's do; what
    remains different is the order in which the wrapper adds up the micro-batches.

    Args:
        model: gives the shape of the network; not changed.
        weights: name -> fp64, where the gradient is taken.
        parts: all micro-batches.
        compute: how.

    Returns:
        Name -> fp64; only of what is trained.
    """
    dtype = torch.float64 if compute.is_exact else torch.float32
    network = copy.deepcopy(model).to(dtype)
    device = parts[0].device
    with torch.no_grad():
        for name, param in network.named_parameters():
            if name in weights:
                param.copy_(weights[name])
    if compute.cast:
        network.to(compute.dtype)
    trained = {name: param for name, param in network.named_parameters() if param.requires_grad}
    found = {name: torch.zeros_like(weights[name]) for name in trained}
    for tokens in parts:
        casting = torch.autocast(device.type, compute.dtype) if compute.autocast else nullcontext()
        with casting:
            loss = loss_of(network, tokens)
        scaled = torch.autograd.grad(loss * compute.loss_scale, list(trained.values()))
        for name, grad in zip(trained, scaled, strict=True):
            found[name] += grad.double() / compute.loss_scale / len(parts)
    return found


class Reference:
    """Weights by name, and what the published update does to them.

    Attributes:
        y: where gradients are taken.
        x: the average; y itself under `averaging="ema"`.
        start: the weights before the first step.
        steps: done.
        lr_max: highest learning rate so far.
        weight_sum: of the averaging weights so far.
    """

    def __init__(self, model: TinyModel, options: Mapping[str, Any]) -> None:
        """Start from the model's weights.

        Args:
            model: whose weights are in fp32.
            options: AMSF's arguments, complete.
        """
        self.options = options
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        self.start = {name: value.double() for name, value in trained.items()}
        self.y = {name: value.clone() for name, value in self.start.items()}
        self.x = {name: value.clone() for name, value in self.start.items()}
        self.z = {name: value.clone() for name, value in self.start.items()}
        self.m = {name: torch.zeros_like(value) for name, value in self.start.items()}
        facts = read_architecture(model)
        self.block_numel = {
            name: resolve(
                options["blocks"], canonical_name(name), tuple(value.shape), facts=facts[name]
            ).block_numel
            for name, value in self.start.items()
        }
        self.v = {
            name: value.new_zeros(value.numel() // self.block_numel[name], 1)
            for name, value in self.start.items()
        }
        self.steps = 0
        self.lr_max = 0.0
        self.weight_sum = 0.0

    @property
    def averages(self) -> bool:
        """Whether x and y differ."""
        return bool(self.options["averaging"] == "schedule_free")

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], clip: float = 0.0) -> None:
        """Clip the gradient of all parameters together, then move.

        Args:
            grads: name -> fp64.
            clip: largest norm; 0: none.
        """
        norm = float(sum(grad.square().sum() for grad in grads.values())) ** 0.5
        factor = min(1.0, clip / (norm + 1e-6)) if clip > 0.0 else 1.0
        self.steps += 1
        warmup_steps = self.options["warmup_steps"]
        lr = self.options["lr"] * (min(1.0, self.steps / warmup_steps) if warmup_steps else 1.0)
        self.lr_max = max(self.lr_max, lr)
        weight = self.steps ** self.options["r"] * self.lr_max ** self.options["weight_lr_power"]
        self.weight_sum += weight
        for name, grad in grads.items():
            update = self._normalized(name, factor * grad)
            if self.averages:
                self._average(name, lr, update, weight / self.weight_sum)
            else:
                self._adam(name, lr, factor * grad)

    def _average(self, name: str, lr: float, update: Tensor, c: float) -> None:
        beta1 = self.options["betas"][0]
        direction = update + self._decay(name) * self.y[name]
        self.z[name] = self.z[name] - lr * direction
        self.x[name] = (1 - c) * self.x[name] + c * self.z[name]
        self.y[name] = (1 - beta1) * self.z[name] + beta1 * self.x[name]

    def _adam(self, name: str, lr: float, grad: Tensor) -> None:
        beta1 = self.options["betas"][0]
        self.m[name] = beta1 * self.m[name] + (1 - beta1) * grad
        update = self.m[name] / (1 - beta1**self.steps) / self._root(name)
        self.y[name] = self.y[name] - lr * self._decay(name) * self.y[name] - lr * update
        self.x[name] = self.y[name]

    def _normalized(self, name: str, grad: Tensor) -> Tensor:
        """The gradient over the root of its block's second moment, which takes it up here."""
        beta2 = self.options["betas"][1]
        mean_square = grad.reshape(-1, self.block_numel[name]).square().mean(dim=1, keepdim=True)
        self.v[name] = beta2 * self.v[name] + (1 - beta2) * mean_square
        return grad / self._root(name)

    def _root(self, name: str) -> Tensor:
        beta2 = self.options["betas"][1]
        root: Tensor = (self.v[name] / (1 - beta2**self.steps)).sqrt() + self.options["eps"]
        return root.expand(-1, self.block_numel[name]).reshape(self.start[name].shape)

    def _decay(self, name: str) -> float:
        if self.options["decay"] == "matrices" and self.start[name].dim() < 2:
            return 0.0
        lr = self.options["lr"] if self.options["decouple_lr"] else 1.0
        return float(self.options["weight_decay"] / lr)
