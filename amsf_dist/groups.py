"""Parameter groups: what a user passes, the names in it, and how each line is cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from amsf_dist import blocks as block_rules
from amsf_dist.architecture import Facts
from amsf_dist.blocks import canonical_name
from amsf_dist.shards import Flats, Part, parameters_in

__all__ = ["Seat", "cut_lines", "names_of", "seats", "split", "trainable", "without_duplicates"]


@dataclass(frozen=True)
class Seat:
    """One tensor that the optimizer moves.

    Attributes:
        group: its parameter group, live.
        param: the tensor.
        name: canonical; "" when it is unknown, or the tensor holds many parameters.
        parts: the parameters in it, and how they are cut.
    """

    group: dict[str, Any]
    param: Tensor
    name: str
    parts: tuple[Part, ...]


def seats(
    groups: Iterable[dict[str, Any]], parts: Iterable[Sequence[tuple[Part, ...]]]
) -> list[Seat]:
    """Who sits in the groups now.

    Args:
        groups: of torch's making.
        parts: aligned with the groups' params.
    """
    return [
        Seat(group, param, name, inside)
        for group, group_parts in zip(groups, parts, strict=True)
        for param, name, inside in zip(group["params"], names_of(group), group_parts, strict=True)
    ]


def split(seats: Sequence[Seat], units: Sequence[Sequence[Tensor]] | None) -> list[list[Seat]]:
    """Seats by the unit that their tensor belongs to; those of none are the last unit."""
    if units is None:
        return [list(seats)]
    number = {id(param): place for place, unit in enumerate(units) for param in unit}
    found: list[list[Seat]] = [[] for _ in range(len(units) + 1)]
    for seat in seats:
        found[number.get(id(seat.param), len(units))].append(seat)
    return [unit for unit in found if unit]


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Named parameters of a module, frozen ones left out: they would cost nothing, and say so."""
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def names_of(group: Mapping[str, Any]) -> list[str]:
    """Canonical names of a group's parameters; "" where the user gave none."""
    given: Sequence[str] = group.get("param_names") or [""] * len(group["params"])
    return [canonical_name(name) for name in given]


def cut_lines(
    group: Mapping[str, Any], facts: Mapping[str, Facts], flats: Flats
) -> list[tuple[Part, ...]]:
    """What lies in every tensor of a group, and how it is cut in blocks.

    Args:
        group: a checked parameter group of torch's making.
        facts: what the module says, by canonical name; empty when no module was given.
        flats: which tensors hold slices of which parameters; likewise.

    Returns:
        One tuple per tensor: the parameters in it, one but for flat parameters.

    Raises:
        TypeError: a parameter is complex.
        ValueError: its blocks cannot be decided; the message has the cure.
    """
    cut = []
    for name, param in zip(names_of(group), group["params"], strict=True):
        if param.dtype.is_complex:
            raise TypeError(
                f"{name or 'a parameter'} is complex; train torch.view_as_real of it instead"
            )
        cut.append(
            tuple(
                Part(
                    part,
                    shape,
                    block_rules.resolve(
                        group["blocks"],
                        part or None,
                        shape,
                        facts=facts.get(part),
                        head_dim=group["head_dim"],
                    ),
                )
                for part, shape in parameters_in(name, param, flats)
            )
        )
    return cut


def without_duplicates(params: Any) -> Any:
    """Tied weights may come once under every name; they are one parameter."""
    if isinstance(params, (Tensor, set, frozenset)) or not isinstance(params, Iterable):
        return params  # torch takes the first and has messages for the others
    seen: dict[int, Any] = {}
    for item in params:
        seen.setdefault(id(item[1] if isinstance(item, tuple) else item), item)
    return list(seen.values())
