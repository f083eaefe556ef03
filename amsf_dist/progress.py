"""How far a step has come: with gradient release its units move one by one inside backward."""

from __future__ import annotations

import torch
from torch import Tensor

from amsf_dist.kernels.choice import on_host
from amsf_dist.plan import Plan, Unit

__all__ = ["Progress"]


class Progress:
    """Of one step.

    Attributes:
        held_back: gradients of earlier micro-batches wait in the parameters for the last one.
        square: 0-dim, squared norm of the gradients of the units that have moved.
        expected: 0-dim, what earlier steps say it will be; None where it is exact.
    """

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self._plan: Plan | None = None
        self._unit_of: dict[int, Unit] = {}
        self._waits: dict[int, int] = {}
        self._arrived: set[int] = set()
        self._moved: set[int] = set()
        self._bad: Tensor | None = None
        self.held_back = self._partly = False
        self.square = torch.zeros(())
        self.expected: Tensor | None = None

    @property
    def begun(self) -> bool:
        """Whether a unit has moved, if only by a part."""
        return bool(self._moved) or self._partly

    @property
    def plan(self) -> Plan | None:
        """What the step goes by since its first gradient arrived; None before."""
        return self._plan if self._arrived or self.begun else None

    def has_moved(self, unit: Unit) -> bool:
        """Whether a unit has moved in this step."""
        return id(unit) in self._moved

    def refuse_between(self) -> None:
        """Before weights are used that must all be of one step.

        Raises:
            RuntimeError: some units have moved and others have not.
        """
        if self.begun:
            raise RuntimeError(
                "a step is half done: gradient release has moved some weights inside backward; "
                "call optimizer.step() first"
            )

    def arrive(self, param: Tensor, plan: Plan, partial: bool) -> Unit | None:
        """A parameter's gradient is there.

        Args:
            param: the parameter.
            plan: of the step.
            partial: whether gradients of further micro-batches will follow.

        Returns:
            Its unit, if that now has all of its gradients.

        Raises:
            RuntimeError: the parameter had one already in this step.
        """
        if plan is not self._plan:
            self._plan = plan
            self._unit_of = {id(h.param): unit for unit in plan.units for h in unit.holdings}
        unit = self._unit_of[id(param)]
        if id(param) in self._arrived:
            if partial or self.held_back and not self.has_moved(unit):
                return None  # added to that of an earlier micro-batch, which still waits for others
            name = next(h.name for h in unit.holdings if h.param is param) or "a parameter"
            raise RuntimeError(
                f"{name} got a second gradient in one step, and gradient release has used the "
                "first: set optimizer.optimizer_accumulation = True before every backward but the "
                "last one of a step, or pass the module to enable_gradient_release(defer=[...])"
            )
        self._arrived.add(id(param))
        if id(unit) not in self._waits:
            self._waits[id(unit)] = sum(h.param.requires_grad for h in unit.holdings)
        self._waits[id(unit)] -= 1
        return unit if not self._waits[id(unit)] else None

    def verdict(self, finite: Tensor, everyone_knows: bool) -> tuple[Tensor, Tensor | int]:
        """Whether a unit may move, and whether it is the first of the step that may not.

        Args:
            finite: 0-dim bool, of the unit's gradients.
            everyone_knows: whether all ranks have it; only then does it hold up later units.
        """
        if self._bad is None and on_host(finite.device) and finite:
            return finite, 0
        before = torch.zeros_like(finite) if self._bad is None else self._bad.to(finite.device)
        bad = finite.logical_not()
        if everyone_knows:
            self._bad = before | bad
            finite = self._bad.logical_not()
        return finite, bad & before.logical_not()

    def moved(self, unit: Unit, partial: bool) -> None:
        """A unit has moved, by all of its gradients or by a part."""
        if partial:
            self._waits.pop(id(unit), None)
            self._arrived -= {id(holding.param) for holding in unit.holdings}
            self._partly = True
        else:
            self._moved.add(id(unit))

    def finish(self) -> None:
        """The step is done."""
        self._arrived.clear()
        self._moved.clear()
        self._waits.clear()
        self._bad = self.expected = None
        self.square = torch.zeros(())
        self.held_back = self._partly = False
