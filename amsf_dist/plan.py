"""What a step works on, worked out once: holdings, counters and the collectives.

The plan is made again when the parameters have changed under the optimizer: a group was added, a
parameter unfrozen, the model moved to its device, or a wrapper put its own parameters into the
groups before the first step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amsf_dist import clipping
from amsf_dist import state as states
from amsf_dist.clock import Lately
from amsf_dist.exact import ExactBlockSums
from amsf_dist.groups import Seat
from amsf_dist.kernels import Grouping, Holding
from amsf_dist.kernels.holding import WEIGHT, Line, Partition
from amsf_dist.lane import Lane
from amsf_dist.peaks import GroupPeaks
from amsf_dist.reduce import BlockSums
from amsf_dist.rules import RULES
from amsf_dist.shards import Flats, copy_into, locate
from amsf_dist.storage import state_storage, weight_storage

__all__ = ["Plan", "Unit", "build", "is_current"]

_State = dict[Tensor, dict[str, Any]]


@dataclass
class Unit:
    """Tensors that step together.

    Attributes:
        lanes: in the order of the groups.
        sums: block sums of all holdings.
        peaks: of groups that share a scale, where a storage has some.
        parts: how many parts of the gradient of this step have been added into the state.
    """

    lanes: list[Lane]
    sums: BlockSums
    peaks: GroupPeaks
    parts: int = 0

    def clip(self, seen: Tensor, expected: Tensor | None) -> Tensor:
        """Set the factors of the gradients whose groups clip by norms.

        Args:
            seen: 0-dim, squared norm of the gradients of units that have moved in this step.
            expected: see `clipping.clip_`.

        Returns:
            `seen`, this unit's added.
        """
        squares = torch.split(self.sums.squares, [len(lane.holdings) for lane in self.lanes])
        # a number of the host's may meet the device's without a copy, which would wait
        total = (self.sums.squares.new_zeros(()) + seen).to(self.sums.squares.dtype)
        for lane, own in zip(self.lanes, squares, strict=True):
            if lane.group["clip"] == "norm":
                total = total + own.sum()
        self.sums.shrink(clipping.clip_(self.lanes, squares, total, expected))
        return total

    @property
    def holdings(self) -> list[Holding]:
        """Of all lanes, in order."""
        return [holding for lane in self.lanes for holding in lane.holdings]


@dataclass
class Plan:
    """Everything a step needs to know about the parameters.

    Attributes:
        units: in the order in which they step.
        signature: what the plan was made from.
    """

    units: list[Unit]
    signature: dict[int, tuple[object, ...]]

    @property
    def holdings(self) -> list[Holding]:
        """Of all units, in order."""
        return [holding for unit in self.units for holding in unit.holdings]

    def shown(self, groups: Iterable[Mapping[str, Any]]) -> list[Unit]:
        """The units whose tensors are in the groups now: an engine may show one at a time."""
        if len(self.units) == 1:
            return self.units
        present = {id(param) for group in groups for param in group["params"]}
        return [unit for unit in self.units if any(id(h.param) in present for h in unit.holdings)]


def is_current(plan: Plan | None, params: Iterable[Tensor], state: _State) -> bool:
    """Whether the plan still describes these tensors and this state."""
    return plan is not None and plan.signature == _signature(params, state)


def build(
    units: Sequence[Sequence[Seat]], state: _State, flats: Flats, own_groups: bool = False
) -> Plan:
    """Locate every parameter and create the state that is missing.

    Args:
        units: the tensors that step together, in the order of the groups.
        state: the optimizer's; completed in place. State of tensors that have no seat any more is
            dropped if nothing was trained yet.
        flats: which parts of which parameters lie in flat tensors.
        own_groups: whether collectives have process groups of their own: inside backward they
            would wait for the wrapper's on the same one.

    Raises:
        RuntimeError: trained parameters were replaced by others.
    """
    params = [seat.param for unit in units for seat in unit]
    _drop_replaced(params, state)
    lately: dict[int, Lately] = defaultdict(Lately)
    made = [_unit(unit, state, flats, own_groups, lately) for unit in units]
    return Plan(made, _signature(params, state))


def _unit(
    seats: Sequence[Seat], state: _State, flats: Flats, own_groups: bool, lately: dict[int, Lately]
) -> Unit:
    on_device: dict[tuple[int, torch.device], list[Holding]] = {}
    for seat in seats:
        # Frozen parameters cost nothing until they are unfrozen, which makes a new plan.
        if seat.param.requires_grad or state.get(seat.param):
            holding = _hold(seat, state, flats)
            key = id(seat.group), holding.exp_avg_sq.device
            on_device.setdefault(key, []).append(holding)
    for holdings in on_device.values():
        for index, holding in enumerate(holdings):
            holding.index = index
    held = [holding for holdings in on_device.values() for holding in holdings]
    exact = any(seat.group["deterministic"] for seat in seats)
    sums = (ExactBlockSums if exact else BlockSums)(held, own_groups)
    peaks = GroupPeaks(held, own_groups)
    lanes = []
    for (number, device), holdings in on_device.items():
        group, rule = holdings[0].group, holdings[0].rule
        own = [state[holding.param] for holding in holdings]
        counters = states.Counters(states.counters_of(group), own, device)
        waits = [sums.waiting(holding) for holding in holdings]
        lanes.append(Lane(group, rule, device, holdings, waits, counters, lately[number]))
    return Unit(lanes, sums, peaks)


def _signature(params: Iterable[Tensor], state: _State) -> dict[int, tuple[object, ...]]:
    """Of the parameters in whatever order: units need not be in that of the groups."""
    return {
        id(param): (
            param.shape,
            param.dtype,
            param.device,
            param.requires_grad,
            id(state.get(param)),
        )
        for param in params
    }


def _hold(seat: Seat, state: _State, flats: Flats) -> Holding:
    group, param = seat.group, seat.param
    if group["clip"] == "tensor" and len(seat.parts) > 1:
        raise ValueError(
            f"clip='tensor' goes by the norm of every parameter, and FSDP1 has joined "
            f"{seat.parts[0].name!r} and others in one: use clip='block', or use_orig_params=True"
        )
    rule, layout = RULES[group["averaging"]], locate(seat.parts, param, flats)
    storage = state_storage(group["state_storage"], param.dtype)
    weights = weight_storage(group["weight_storage"], param.dtype)
    entries, memory = state[param], layout.local(param.detach())
    if not entries:
        entries.update(states.create(param, layout, rule, storage, weights))
    elif layout.local(entries[states.MOMENTS[0]]).device != memory.device:
        # the model went to another device, or came from "meta", after its state was made
        for key, fresh in states.create(param, layout, rule, storage, weights).items():
            if not entries[key].is_meta:
                copy_into(fresh, entries[key])
            entries[key] = fresh
    for key, fresh in weights.beside(WEIGHT, param).items():
        entries.setdefault(key, fresh)  # the model was cast after its state was made
    return Holding(
        param=param,
        name=seat.name,
        partitions=tuple(
            Partition(key, cut, cut.local(entries[key]).view(-1))
            for key, cut in zip(states.MOMENTS, (layout, *layout.others), strict=False)
        ),
        rule=rule,
        weight_storage=weights,
        errors=tuple(layout.local(entries[key]) for key in weights.keys(WEIGHT)[1:]),
        lines=tuple(
            Line(storage, tuple(layout.local(entries[key]) for key in storage.keys(line)))
            for line in rule.lines
        ),
        group=group,
        index=0,
        grouping=Grouping.of(layout, layout.local(param.detach()).device.type)
        if storage.group
        else None,
    )


def _drop_replaced(params: Iterable[Tensor], state: _State) -> None:
    present = set(params)
    for param in [param for param in state if param not in present]:
        if states.number(state[param].get("step")) > 0.0:
            raise RuntimeError(
                f"a trained parameter of shape {tuple(param.shape)} is no longer in the groups: "
                "the model was wrapped, or loaded with assign=True, after training began; save the "
                "optimizer, build it anew after wrapping, and load its state"
            )
        del state[param]
