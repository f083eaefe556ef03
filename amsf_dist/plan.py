"""What a step works on, worked out once: holdings, counters and the collectives.

The plan is made again when the parameters have changed under the optimizer: a group was added, a
parameter unfrozen, the model moved to its device, or a wrapper put its own parameters into the
groups before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amsf_dist import kernels
from amsf_dist import state as states
from amsf_dist.exact import ExactBlockSums
from amsf_dist.groups import names_of
from amsf_dist.kernels import Holding
from amsf_dist.kernels.holding import Line
from amsf_dist.reduce import BlockSums
from amsf_dist.rules import RULES, Rule
from amsf_dist.rules.protocol import Coefficients, Scalar
from amsf_dist.shards import Flats, Layout, Part, copy_into, locate
from amsf_dist.storage import state_storage, weight_storage

__all__ = ["Lane", "Plan", "build", "is_current", "on_host"]

_State = dict[Tensor, dict[str, Any]]


@dataclass
class Lane:
    """Parameters of one group on one device: they share hyper-parameters and counters."""

    group: dict[str, Any]
    rule: Rule
    device: torch.device
    holdings: list[Holding]
    counters: states.Counters

    def move(self, finite: Tensor, everyone_knows: bool, moving: bool) -> None:
        """Advance the counters and move every parameter that has a gradient.

        Args:
            finite: 0-dim bool on the lane's device; where False nothing changes.
            everyone_knows: whether all ranks that share the step have this verdict; if not, every
                block decides for itself.
            moving: whether any parameter of the optimizer has a gradient here.
        """
        stepping = [h for h in self.holdings if h.param.grad is not None]
        # nothing of these lies here, and only FSDP1 leaves out their gradients: they count along
        absent = [
            h
            for h in self.holdings
            if h.param.grad is None and h.layout.flat and not h.layout.numel
        ]
        counts = moving and self.rule.ticks_without_gradient
        elsewhere = self.group["train_mode"] and len(absent) == len(self.holdings)
        host = on_host(self.device)
        if not (stepping or counts or elsewhere) or (host and everyone_knows and not finite):
            return
        # Where the host can read the verdict for nothing, a finite step needs no masks.
        verdict = None if host and finite else finite
        coefficients = self.advance(stepping + absent, finite if everyone_knows else None)
        by_block = verdict is not None and not everyone_knows
        for holding in stepping:
            kernels.move_(holding, coefficients[holding.index], verdict, by_block)

    def advance(self, stepping: Sequence[Holding], finite: Tensor | None) -> list[Coefficients]:
        """Advance the counters of the parameters that step now.

        Args:
            stepping: those with a gradient.
            finite: 0-dim bool; where False no counter moves. None: all move.

        Returns:
            The rule's scalars per holding, by `index`: floats where the host can read them for
            nothing, else 0-dim tensors on the device.
        """
        by = 1.0 if finite is None else finite.double()
        tick = torch.zeros(len(self.holdings), dtype=torch.float64, device=self.device)
        if self.rule.ticks_without_gradient or len(stepping) == len(self.holdings):
            tick += by
        else:
            for holding in stepping:
                tick[holding.index] += by
        columns = self.rule.advance(self.counters.values, tick, self.group)
        rows = zip(*(_per_parameter(column, len(self.holdings)) for column in columns), strict=True)
        return [type(columns)(*row) for row in rows]


def on_host(device: torch.device) -> bool:
    """Whether the host can read a tensor of this device without waiting for anything."""
    return device.type == "cpu"


def _per_parameter(column: Tensor | float, count: int) -> Sequence[Scalar]:
    if not isinstance(column, Tensor):
        return [column] * count
    return column.tolist() if on_host(column.device) else column.unbind()


@dataclass
class Plan:
    """Everything a step needs to know about the parameters.

    Attributes:
        lanes: in the order of the groups.
        sums: block sums of all holdings.
        signature: what the plan was made from.
    """

    lanes: list[Lane]
    sums: BlockSums
    signature: tuple[object, ...]

    @property
    def holdings(self) -> list[Holding]:
        """Of all lanes, in order."""
        return [holding for lane in self.lanes for holding in lane.holdings]


def is_current(plan: Plan | None, groups: Sequence[dict[str, Any]], state: _State) -> bool:
    """Whether the plan still describes these groups and this state."""
    return plan is not None and plan.signature == _signature(groups, state)


def build(
    groups: Sequence[dict[str, Any]],
    state: _State,
    parts: Sequence[Sequence[tuple[Part, ...]]],
    flats: Flats,
) -> Plan:
    """Locate every parameter and create the state that is missing.

    Args:
        groups: parameter groups.
        state: the optimizer's; completed in place. State of parameters that are in no group any
            more is dropped if nothing was trained yet.
        parts: what lies in each tensor and how it is cut, aligned with the groups' params.
        flats: where the slices of flat parameters lie.

    Raises:
        RuntimeError: trained parameters were replaced by others.
    """
    _drop_replaced(groups, state)
    lanes: list[Lane] = []
    for group, group_parts in zip(groups, parts, strict=True):
        rule = RULES[group["averaging"]]
        on_device: dict[torch.device, list[Holding]] = {}
        for param, name, inside in zip(group["params"], names_of(group), group_parts, strict=True):
            # Frozen parameters cost nothing until they are unfrozen, which makes a new plan.
            if param.requires_grad or state.get(param):
                layout = locate(inside, param, flats)
                holding = _hold(group, rule, param, name, layout, state)
                on_device.setdefault(holding.exp_avg_sq.device, []).append(holding)
        for device, holdings in on_device.items():
            for index, holding in enumerate(holdings):
                holding.index = index
            own = [state[holding.param] for holding in holdings]
            lanes.append(Lane(group, rule, device, holdings, states.Counters(rule, own, device)))
    plan = Plan(lanes, BlockSums(()), _signature(groups, state))
    exact = any(group["deterministic"] for group in groups)
    plan.sums = (ExactBlockSums if exact else BlockSums)(plan.holdings)
    return plan


def _signature(groups: Sequence[dict[str, Any]], state: _State) -> tuple[object, ...]:
    return tuple(
        (id(param), param.shape, param.device, param.requires_grad, id(state.get(param)))
        for group in groups
        for param in group["params"]
    )


def _hold(
    group: dict[str, Any], rule: Rule, param: Tensor, name: str, layout: Layout, state: _State
) -> Holding:
    storage = state_storage(group["state_storage"], param.dtype)
    entries = state[param]
    if not entries:
        entries.update(states.create(param, layout, rule, storage))
    elif layout.local(entries[states.MOMENT]).device != layout.local(param.detach()).device:
        # the model went to another device, or came from "meta", after its state was made
        for key, fresh in states.create(param, layout, rule, storage).items():
            if not entries[key].is_meta:
                copy_into(fresh, entries[key])
            entries[key] = fresh
    return Holding(
        param=param,
        name=name,
        layout=layout,
        rule=rule,
        weight_storage=weight_storage(group["weight_storage"], param.dtype),
        lines=tuple(
            Line(storage, tuple(layout.local(entries[key]) for key in storage.keys(line)))
            for line in rule.lines
        ),
        exp_avg_sq=layout.local(entries[states.MOMENT]).view(-1),
        group=group,
        index=0,
    )


def _drop_replaced(groups: Sequence[dict[str, Any]], state: _State) -> None:
    present = {param for group in groups for param in group["params"]}
    for param in [param for param in state if param not in present]:
        if states.number(state[param].get("step")) > 0.0:
            raise RuntimeError(
                f"a trained parameter of shape {tuple(param.shape)} is no longer in the groups: "
                "the model was wrapped, or loaded with assign=True, after training began; save the "
                "optimizer, build it anew after wrapping, and load its state"
            )
        del state[param]
