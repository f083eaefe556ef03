"""Which weights a checkpoint belongs to: a model saved at x beside a state saved at y is refused.

Both files are complete and load without complaint, and the error, x - y in every weight, is silent.
A state dict therefore carries the first number of every parameter at y (where this rank has it),
and the first use after loading compares it with what the parameters hold.

torch's functions for state dicts merge lists item by item with those of the optimizer that loads,
and reorder parameters without telling: the numbers stand by name in one string, with their mode.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from amsf_dist.kernels import Holding
from amsf_dist.state import STASH
from amsf_dist.storage import Groups

__all__ = ["KEY", "first_weights", "read", "refuse_mixed_up", "written"]

KEY = "first_weights"


def first_weights(
    holdings: Sequence[Holding], state: Mapping[Tensor, Mapping[str, Any]]
) -> dict[int, float | None]:
    """id(parameter) -> its first number at y; None where that lies on another rank."""
    return {
        id(holding.param): _first(holding, state[holding.param].get(STASH, holding.param))
        for holding in holdings
    }


def written(
    group: Mapping[str, Any], holdings: Sequence[Holding], stamps: Mapping[int, float | None]
) -> str:
    """How the stamps of one group stand in a state dict.

    Args:
        group: ours.
        holdings: of all groups.
        stamps: id(parameter) -> its first number at y, None where that lies on another rank.
    """
    first = {name: stamps.get(id(h.param)) for name, h in _named(group, holdings)}
    known = {name: weight for name, weight in first.items() if weight is not None}
    return json.dumps({"train_mode": group["train_mode"], "weights": known})


def read(text: Any, group: Mapping[str, Any], holdings: Sequence[Holding]) -> dict[int, float]:
    """What `written` wrote, of those parameters that we have.

    Args:
        text: from a saved group; anything else is no stamp.
        group: ours, with the saved options.
        holdings: of all groups.

    Returns:
        id(parameter) -> its first number at y. Nothing where mode and stamps were not saved
        together: torch fills what a state dict lacks with what the loading optimizer would save.
    """
    found: dict[str, Any] = json.loads(text) if isinstance(text, str) else {}
    if found.get("train_mode") != group["train_mode"]:
        return {}
    weights = found["weights"]
    return {id(h.param): weights[name] for name, h in _named(group, holdings) if name in weights}


def _named(group: Mapping[str, Any], holdings: Sequence[Holding]) -> Iterator[tuple[str, Holding]]:
    """Names of the first parameter in every tensor of a group; its place where it has no name."""
    held = {id(holding.param): holding for holding in holdings}
    for place, param in enumerate(group["params"]):
        if holding := held.get(id(param)):
            names = [piece.part.name for piece in holding.layout.pieces[:1]]
            yield "".join(names) or str(place), holding


def _first(holding: Holding, tensor: Tensor) -> float | None:
    place = holding.layout.first
    return None if place is None else float(holding.memory(tensor).reshape(-1)[place])


def refuse_mixed_up(holdings: Sequence[Holding], stamps: Mapping[int, float | None]) -> None:
    """Compare the parameters with the stamps of a loaded state.

    Args:
        holdings: of all parameters.
        stamps: id(parameter) -> its first number at y when the state was saved.

    Raises:
        RuntimeError: the parameters hold the other of x and y than the state says.
    """
    right, mixed_up = 0, []
    for holding in holdings:
        stamp = stamps.get(id(holding.param))
        now, place = _first(holding, holding.param), holding.layout.first
        if stamp is None or now is None or place is None or not holding.rule.averaged:
            continue
        here, dtype = slice(place, place + 1), holding.compute_dtype
        lines = tuple(
            line.storage.load(
                tuple(tensor.reshape(-1) for tensor in line.tensors), here, dtype, Groups(0, 0)
            )
            for line in holding.lines
        )
        y = torch.full_like(lines[0], stamp, dtype=dtype)
        x = holding.rule.to_x(y, lines, holding.group).to(holding.param.dtype)
        training = holding.group["train_mode"]
        expected, other = (stamp, float(x)) if training else (float(x), stamp)
        close = 4.0 * abs(other) * 2.0 ** -(7 if holding.param.itemsize == 2 else 22)
        if expected == now:
            right += expected != other
        elif abs(now - other) <= close < abs(expected - other):
            mixed_up.append(holding.name or "a parameter")
    if mixed_up and not right:
        held, saved = ("x", "y") if holdings[0].group["train_mode"] else ("y", "x")
        raise RuntimeError(
            f"the model holds {held} but the optimizer's state was saved with {saved} in the "
            f"parameters ({mixed_up[0]} and {len(mixed_up) - 1} more): they are files of different "
            "modes; load a model and an optimizer file that were saved together, both in train "
            "mode or both in eval mode"
        )
