"""What the parameters hold: training weights y, or the average x."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from amsf_dist import kernels
from amsf_dist.blocks import canonical_name
from amsf_dist.kernels import Holding
from amsf_dist.owner import Owner
from amsf_dist.state import STASH
from amsf_dist.watch import Watch

__all__ = ["TwoModes"]


class TwoModes(Optimizer):
    """The part of the optimizer that goes between y and x."""

    _watch: Watch
    _owner: Owner | None

    @property
    def holdings(self) -> list[Holding]:
        """What this rank holds of every tensor."""
        raise NotImplementedError

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average x into the parameters; y is kept aside, exactly. Idempotent.

        Under an engine (DeepSpeed) every rank must call it: the model's weights are gathered anew.
        """
        # y cannot be had back from x to the bit: the sum that makes x rounds. So the copy, which
        # costs the weights' bytes on this rank while it lasts, is the price of an exact round trip.
        for holding in self._to_change(training=True):
            weights = holding.param.detach()
            self.state[holding.param][STASH] = weights.clone()
            kernels.average_(holding, out=holding.memory(weights))
        self._set_mode(training=False)

    @torch.no_grad()
    def train(self) -> None:
        """Put y back, bit for bit. Idempotent; under an engine every rank must call it."""
        for holding in self._to_change(training=False):
            weights = holding.memory(holding.param)
            stash = self.state[holding.param].pop(STASH, None)
            if stash is None:  # a checkpoint written in eval mode whose loader dropped y
                kernels.average_(holding, out=weights, back=True)
            else:
                weights.copy_(holding.memory(stash))
        self._set_mode(training=True)

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Parameters hold x inside the block; afterwards whatever they held before."""
        training = any(group["train_mode"] for group in self.param_groups)
        self.eval()
        try:
            yield
        finally:
            if training:
                self.train()

    @torch.no_grad()
    def averaged_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state dict at x, without touching the parameters.

        Args:
            model: whose parameters this optimizer trains; wrappers are seen through.

        Returns:
            Canonical name -> tensor. Trained parameters are new tensors, DTensors where the
            parameters are, whole ones under an engine (then every rank must call it); frozen ones
            and buffers are the model's own.
        """
        self._watch.between_steps(self.holdings)
        averages: dict[int, Tensor] = {}
        for holding in self.holdings:
            averages[id(holding.param)] = x = holding.param.detach().clone()
            if holding.group["train_mode"]:
                kernels.average_(holding, out=holding.memory(x))
        if self._owner is not None:
            return self._owner.whole(averages, model)
        tied: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
        return {
            canonical_name(name): averages.get(id(tied.get(name)), value)
            for name, value in model.state_dict().items()
        }

    def _to_change(self, *, training: bool) -> list[Holding]:
        """The holdings whose parameters hold y, or x."""
        self._watch.between_steps(self.holdings)
        return [
            holding
            for holding in self.holdings
            if holding.rule.averaged and holding.group["train_mode"] == training
        ]

    def _set_mode(self, *, training: bool) -> None:
        changed = False
        for group in self.param_groups:
            changed |= group["train_mode"] != training
            group["train_mode"] = training
        if changed and self._owner is not None:
            self._owner.publish()
