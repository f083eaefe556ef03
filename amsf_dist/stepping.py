"""A step: measure the blocks, agree on those that are cut, move; at once, or unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amsf_dist import clipping, plan
from amsf_dist.hyper import Hyper
from amsf_dist.lane import Advanced
from amsf_dist.modes import TwoModes
from amsf_dist.owner import Owner

__all__ = ["Stepping"]


class Stepping(TwoModes):
    """The part of the optimizer that takes steps."""

    optimizer_accumulation: bool
    """This micro-batch accumulates; False: it also updates (docs/release.md)."""
    _split: list[list[Tensor]] | None
    _into_state: bool
    _square: Tensor | None
    _skipped: Tensor | int
    _owner: Owner | None
    _plan: plan.Plan | None

    if TYPE_CHECKING:

        def _ready(self) -> plan.Plan: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move the weights by their gradients.

        A step whose gradients are not all finite changes nothing and is counted in
        `skipped_steps`; under sharding, and with `nonfinite="block"`, see docs/algorithm.md,
        "Non-finite gradients".

        Args:
            closure: evaluates the model anew and gives the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: the parameters hold the average (after `eval`), a gradient is sparse, or
                the model got other parameters since the optimizer was built.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.optimizer_accumulation:
            self._progress.held_back = True
            return loss
        if self._owner is not None:
            self._owner.before_step()
        current = self._ready()
        if not self._progress.begun:
            self._watch.before_step(self.param_groups, current.holdings)
        for unit in current.shown(self.param_groups):
            if not self._progress.has_moved(unit):
                self.update(unit)
                if self.is_split:  # it got its gradients, but not all of them
                    _free(unit)
        if any(group["clip"] == "norm" for group in self.param_groups):
            self._square = self._progress.square
        self._progress.finish()
        return loss

    def update(self, unit: plan.Unit, last: bool = True) -> None:
        """Measure, agree, move: one step of tensors that step together.

        Every rank calls it with the same parameters in the same order, with gradients or without.

        Args:
            unit: of the plan.
            last: False: these gradients are a part of the step's, others will follow.
        """
        if last and unit.parts:  # the last part brings more than its gradient
            for holding in unit.holdings:
                if holding.param.grad is None and holding.param.requires_grad:
                    holding.param.grad = torch.zeros_like(holding.param)
        sums, lanes = unit.sums, unit.lanes
        sums.clear()
        for lane in lanes:  # measure what this rank can see
            for kernel in lane.waiting:
                sums.measure(kernel)
        sums.send()
        scalars = [] if sums.everyone_knows else _step_free(unit, last)
        finite = sums.agree()  # on the blocks cut by a shard boundary
        self._clip(unit)
        finite, first = self._verdicts(finite, sums.everyone_knows)
        if sums.everyone_knows:
            scalars = [lane.advance(finite[lane.device], unit.parts, last) for lane in lanes]
        moves = [
            move
            for lane, own in zip(lanes, scalars, strict=True)
            for move in lane.moves(lane.waiting, own, finite[lane.device], sums.everyone_knows)
        ]
        unit.peaks.agree(moves)  # on scales that shards share
        for move in moves:
            move.write()
        if isinstance(self._skipped, Tensor):
            self._skipped += first  # in place, so that a CUDA graph counts too
        else:
            self._skipped = first + self._skipped
        unit.parts = 0 if last else unit.parts + 1

    def _verdicts(
        self, finite: dict[torch.device, Tensor], everyone_knows: bool
    ) -> tuple[dict[torch.device, Tensor], Tensor | int]:
        """Whether a unit may move, by device, and whether it is the step's first that may not."""
        verdicts = {
            device: self._progress.verdict(verdict, everyone_knows)
            for device, verdict in finite.items()
        }
        firsts = [first for _, first in verdicts.values()]  # the same on every device
        return {device: may for device, (may, _) in verdicts.items()}, firsts[0] if firsts else 0

    @property
    def skipped_steps(self) -> int:
        """Steps in which a gradient was not finite, whatever it held back.

        The same on every rank that has the verdict about all gradients; where blocks decide for
        themselves, those that this rank saw. Reading it waits for the device.
        """
        return int(self._skipped)

    @property
    def is_split(self) -> bool:
        """Whether modules step one by one (gradient release)."""
        return self._split is not None

    def split(self, units: Sequence[Sequence[Tensor]] | None, into_state: bool = False) -> None:
        """Step these parameters together, and those together; what gradient release calls.

        Args:
            units: the same on every rank; parameters in none of them are one more. None: all
                parameters step together.
            into_state: whether gradients of earlier micro-batches are added into the state.

        Raises:
            RuntimeError: a step is half done.
        """
        self._progress.refuse_between()
        self._watch.refuse_replaced(self.param_groups)
        self._split = None if units is None else [list(unit) for unit in units]
        self._into_state = into_state
        self._plan = None
        self._ready()

    def set_clip(self, clip: str | None, max_norm: float | None = None) -> None:
        """Clip from now on, in every group; see the class.

        Raises:
            TypeError, ValueError: as the constructor.
            RuntimeError: a step is half done.
        """
        self._progress.refuse_between()
        for group in self.param_groups:
            known = {key: group[key] for key in self.defaults if key != "train_mode"}
            told = Hyper.of({**known, "clip": clip, "max_norm": max_norm}).as_group()
            group.update(clip=told["clip"], max_norm=told["max_norm"])
        self.defaults.update(clip=clip, max_norm=max_norm)
        self._plan = None
        self._ready()

    @torch.no_grad()
    def arrived(self, param: Tensor) -> None:
        """A parameter's gradient is final: move its unit if it was the last one missing.

        Raises:
            RuntimeError: the unit has moved already in this step, or as for `step`.
        """
        partial = self.optimizer_accumulation
        if partial:
            self._progress.held_back = True
        if partial and not self._into_state:
            return
        # once for a step: looking at all parameters for each of them would take their square
        current = self._progress.plan or self._ready()
        unit = self._progress.arrive(param, current, partial)
        if unit is None:
            return
        if not self._progress.begun:
            self._watch.inside_backward(self.param_groups, current.holdings)
        self.update(unit, last=not partial)
        self._progress.moved(unit, partial)
        _free(unit)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients, unless they are those of earlier micro-batches of this step."""
        if not self._progress.held_back:
            super().zero_grad(set_to_none)

    def _clip(self, unit: plan.Unit) -> None:
        progress = self._progress
        if not any(lane.group["clip"] in clipping.NEEDS_NORMS for lane in unit.lanes):
            return
        if self.is_split and progress.expected is None:
            lanes = [lane for one in self._ready().units for lane in one.lanes]
            progress.expected = clipping.expected_square(lanes)
        progress.square = unit.clip(progress.square, progress.expected)

    @property
    def grad_norm(self) -> float | None:
        """Norm of all gradients of the last step before clipping; None without `clip="norm"`.

        Reading it waits for the device.
        """
        return None if self._square is None else float(self._square) ** 0.5


def _step_free(unit: plan.Unit, last: bool) -> list[Advanced | None]:
    """While ranks agree: measure and move what they need not agree on; blocks decide themselves.

    Returns:
        What the lanes' steps multiply by.
    """
    sums, lanes = unit.sums, unit.lanes
    for lane in lanes:
        for kernel in lane.free:
            sums.measure(kernel, later=True)
    scalars = [lane.advance(None, unit.parts, last) for lane in lanes]
    finite = sums.finite_here()
    for lane, own in zip(lanes, scalars, strict=True):
        for move in lane.moves(lane.free, own, finite[lane.device], everyone_knows=False):
            move.write()
    return scalars


def _free(unit: plan.Unit) -> None:
    """Drop the gradients of a unit."""
    for holding in unit.holdings:
        holding.param.grad = None
