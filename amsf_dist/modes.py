"""What the parameters hold: training weights y, or the average x."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from amsf_dist import kernels
from amsf_dist.blocks import canonical_name
from amsf_dist.kernels import Holding
from amsf_dist.owner import Owner
from amsf_dist.progress import Progress
from amsf_dist.shards import copy_into
from amsf_dist.state import STASH
from amsf_dist.watch import Watch

__all__ = ["TwoModes"]


class TwoModes(Optimizer):
    """The part of the optimizer that goes between y and x."""

    _watch: Watch
    _progress: Progress
    _owner: Owner | None

    if TYPE_CHECKING:

        @property
        def holdings(self) -> list[Holding]:  # noqa: D102
            ...

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
            stash = self.state[holding.param].pop(STASH, None)
            if stash is None:  # a checkpoint written in eval mode whose loader dropped y
                kernels.unaverage_(holding)
            else:
                holding.memory(holding.param).copy_(holding.memory(stash))
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
    def averaged_state_dict(
        self, model: nn.Module, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The model's state dict at x, without touching the parameters.

        Args:
            model: whose parameters this optimizer trains; wrappers are seen through.
            dtype: of the trained parameters; None: their own. `torch.float32` gives what 16-bit
                weights and their error bits are together.

        Returns:
            Canonical name -> tensor. Trained parameters are new tensors, DTensors where the
            parameters are, whole ones under an engine (then every rank must call it); frozen ones
            and buffers are the model's own.
        """
        self._between_steps()
        averages = {id(h.param): self._average(h, dtype or h.param.dtype) for h in self.holdings}
        if self._owner is not None:
            return self._owner.whole(averages, model, dtype)
        tied: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
        return {
            canonical_name(name): averages.get(id(tied.get(name)), value)
            for name, value in model.state_dict().items()
        }

    def _average(self, holding: Holding, dtype: torch.dtype) -> Tensor:
        """X as a new tensor laid out as the parameter, whatever that holds now."""
        param = holding.param.detach()
        stash = self.state[holding.param].get(STASH)
        at_x = holding.rule.averaged and not holding.group["train_mode"]
        if at_x and (stash is None or dtype == param.dtype):
            return param.to(dtype, copy=True)
        x = torch.empty_like(param, dtype=dtype)
        weight = holding.weight
        if at_x and stash is not None:  # the parameter holds x rounded; y is exact
            weight = (holding.memory(stash), *holding.errors)
        kernels.average_(holding, out=holding.memory(x), weight=weight)
        return x

    @torch.no_grad()
    def load_averaged_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over weights x, error bits included: what `averaged_state_dict` gave, of any dtype.

        Args:
            state_dict: canonical name -> x, whole tensors or DTensors laid out as the parameters;
                names that the optimizer does not train are left alone.

        Raises:
            RuntimeError: the parameters hold x (after `eval`), or an engine owns the weights.
            ValueError: a parameter is missing, or has another shape; nothing is changed then.
        """
        if self._owner is not None:
            raise RuntimeError(
                "the weights belong to DeepSpeed: load them with "
                "amsf_dist.integrations.deepspeed.load_state_dict(engine, ...)"
            )
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError("the parameters hold the average x: call optimizer.train() first")
        self._between_steps()
        given = {canonical_name(name): value for name, value in state_dict.items()}
        for holding in self.holdings:
            value = given.get(holding.name)
            if value is None or tuple(value.shape) != tuple(holding.param.shape):
                found = "missing" if value is None else f"of shape {tuple(value.shape)}"
                raise ValueError(
                    f"{holding.name or 'a parameter without a name'} is {found} in the state dict, "
                    f"the optimizer has it with shape {tuple(holding.param.shape)}"
                )
        for holding in self.holdings:
            value = given[holding.name]
            x = torch.empty_like(holding.param.detach(), dtype=value.dtype)
            copy_into(x, value)
            kernels.assign_(holding, holding.memory(x))

    @torch.no_grad()
    def make_room(self, *, training: bool) -> None:
        """Have the state of one mode, before a checkpoint of that mode is read into it.

        `torch.distributed.checkpoint` reads what it finds in the state dict that it is given: in
        train mode that has no place for y of a checkpoint that was saved in eval mode. Parameters
        are not touched, what they hold is about to be overwritten.

        Args:
            training: the mode of the checkpoint.
        """
        for holding in self._to_change(training=not training):
            if training:
                self.state[holding.param].pop(STASH, None)
            else:
                self.state[holding.param][STASH] = torch.zeros_like(holding.param)
        for group in self.param_groups:
            group["train_mode"] = training

    def _between_steps(self) -> None:
        self._progress.refuse_between()
        self._watch.between_steps(self.holdings)

    def _to_change(self, *, training: bool) -> list[Holding]:
        """The holdings whose parameters hold y, or x."""
        self._between_steps()
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
