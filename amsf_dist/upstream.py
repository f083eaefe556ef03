"""State dicts of the optimizers AMSF comes from, read into one form and matched to parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from amsf_dist.blocks import canonical_name
from amsf_dist.groups import names_of

__all__ = ["SOURCES", "Foreign", "Saved", "match", "read"]

logger = logging.getLogger(__name__)

# Which entries a parameter's state must have; adam_mini's second moment is "v" or "vmean".
SOURCES: dict[str, tuple[str, ...]] = {
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
    "schedulefree": ("z", "exp_avg_sq"),
    "adam_mini": ("step", "m"),
}


@dataclass(frozen=True)
class Saved:
    """What another optimizer knew of one parameter.

    Attributes:
        name: there; "" when it kept none.
        betas: of its group.
        step: steps that entered the moments.
        exp_avg_sq: second moment, one number per element or (adam_mini) per equal run of them; None
            when the parameter never had a gradient.
        exp_avg: first moment, if it has one.
        z: Schedule-Free's base iterate, if it has one.
        weight_sum: Schedule-Free's sum of averaging weights.
        lr_max: Schedule-Free's highest learning rate so far.
    """

    name: str
    betas: tuple[float, float]
    step: float
    exp_avg_sq: Tensor | None = None
    exp_avg: Tensor | None = None
    z: Tensor | None = None
    weight_sum: float = 0.0
    lr_max: float = 0.0


@dataclass(frozen=True)
class Foreign:
    """A whole state dict.

    Attributes:
        source: key of `SOURCES`.
        groups: its parameters, in order.
        training: whether the parameters held training weights when it was saved.
    """

    source: str
    groups: list[list[Saved]]
    training: bool = True


def read(state_dict: Mapping[str, Any], source: str = "auto") -> Foreign:
    """Recognise a state dict and read it.

    Args:
        state_dict: as `Optimizer.state_dict` or `get_optimizer_state_dict` gives it.
        source: a key of `SOURCES`, or "auto".

    Raises:
        ValueError: it is none of these, or incomplete.
    """
    if source not in ("auto", *SOURCES):
        raise ValueError(f"source must be one of 'auto', {_listed(SOURCES)}, got {source!r}")
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "an optimizer's state dict has 'state' and 'param_groups'; of a training checkpoint "
            "pass the optimizer's part"
        )
    groups = state_dict["param_groups"]
    if any("averaging" in group for group in groups):
        raise ValueError(
            "this is AMSF's own state dict: take it over with optimizer.load_state_dict; to change "
            "averaging=, import what export_state_dict makes of it"
        )
    found = _recognise(state_dict["state"])
    if source not in ("auto", found):
        raise ValueError(f"source={source!r}, but the state dict is that of {found!r}")
    parameters = [list(_parameters(group, state_dict["state"])) for group in groups]
    for name, entries in (parameter for group in parameters for parameter in group):
        _check(found, name, entries)
    if found == "schedulefree":
        return _schedulefree(groups, parameters)
    of = _adamw if found == "adamw" else _adam_mini
    saved = [
        [of(group, name, entries) for name, entries in inside]
        for group, inside in zip(groups, parameters, strict=True)
    ]
    return Foreign(found, saved)


def _recognise(state: Mapping[Any, Mapping[str, Any]]) -> str:
    entries = next((entries for entries in state.values() if entries), None)
    if entries is None:
        raise ValueError("the state dict has no state yet (no step was taken): nothing to import")
    for source, keys in SOURCES.items():
        # one key may be missing, so that the message can say of which parameter
        if {*keys} - {"step", "exp_avg_sq"} <= entries.keys():
            return source
    raise ValueError(
        f"a parameter's state has {_listed(entries)}, which is none of {_listed(SOURCES)}"
    )


def _parameters(
    group: Mapping[str, Any], state: Mapping[Any, Mapping[str, Any]]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, state) of a group's parameters."""
    keys = group["params"]
    names = group.get("param_names") or [group.get("name", "")] * len(keys)
    for key, name in zip(keys, names, strict=True):
        # torch.distributed.checkpoint.state_dict keys parameters by name
        yield (key if isinstance(key, str) else str(name)), state.get(key) or {}


def _check(source: str, name: str, entries: Mapping[str, Any]) -> None:
    keys = SOURCES[source]
    if source == "adam_mini":
        keys = (*keys, "v" if "v" in entries else "vmean")
    for key in keys if entries else ():
        if key not in entries:
            raise ValueError(
                f"{name or 'a parameter'}: {source} state without {key!r} (it has "
                f"{_listed(entries)})"
            )
        if key != "step" and not isinstance(entries[key], Tensor):
            kind = type(entries[key]).__name__
            raise ValueError(f"{name or 'a parameter'}: {key!r} must be a tensor, got {kind}")


def _adamw(group: Mapping[str, Any], name: str, entries: Mapping[str, Any]) -> Saved:
    if group.get("amsgrad"):
        raise ValueError(
            f"{name or 'a parameter'}: saved with amsgrad=True, whose maximum AMSF has no place "
            "for; set 'amsgrad' of its group to False to go on from exp_avg_sq"
        )
    return Saved(
        name,
        _betas(group),
        float(entries.get("step", 0.0)),
        exp_avg_sq=entries.get("exp_avg_sq"),
        exp_avg=entries.get("exp_avg"),
    )


def _adam_mini(group: Mapping[str, Any], name: str, entries: Mapping[str, Any]) -> Saved:
    stepped = float(entries.get("step", 0)) > 0
    return Saved(
        name,
        (float(group["beta1"]), float(group["beta2"])),
        float(entries.get("step", 0)),
        exp_avg_sq=entries.get("v", entries.get("vmean")) if stepped else None,
        exp_avg=entries["m"] if stepped else None,
    )


def _schedulefree(
    groups: Sequence[Mapping[str, Any]],
    parameters: Sequence[Sequence[tuple[str, Mapping[str, Any]]]],
) -> Foreign:
    for number, group in enumerate(groups):
        for key in ("k", "weight_sum", "lr_max", "train_mode"):
            if key not in group:
                raise ValueError(f"parameter group {number}: schedulefree state without {key!r}")
    modes = {bool(group["train_mode"]) for group in groups}
    if len(modes) != 1:
        raise ValueError(
            "some parameter groups were saved in train mode and some in eval mode: call eval() of "
            "the schedulefree optimizer and save again"
        )
    saved = [
        [
            Saved(
                name,
                _betas(group),
                float(group["k"]),
                exp_avg_sq=entries.get("exp_avg_sq"),
                z=entries.get("z"),
                weight_sum=float(group["weight_sum"]),
                lr_max=max(float(group["lr_max"]), 0.0),  # -1 before the first step
            )
            for name, entries in inside
        ]
        for group, inside in zip(groups, parameters, strict=True)
    ]
    return Foreign("schedulefree", saved, modes.pop())


def _betas(group: Mapping[str, Any]) -> tuple[float, float]:
    beta1, beta2 = group["betas"]
    return float(beta1), float(beta2)


def match(
    groups: Sequence[Mapping[str, Any]], found: Foreign, names: Sequence[str] | None = None
) -> dict[int, Saved]:
    """Find which saved parameter is which of ours.

    Args:
        groups: our parameter groups.
        found: from `read`.
        names: of the saved parameters in their order, where the state dict has none.

    Returns:
        id(param) -> what was saved of it: by name where both sides have names, else by order.

    Raises:
        ValueError: names are missing or double, or the order cannot be relied on.
    """
    theirs = [saved for group in found.groups for saved in group]
    known = list(names) if names is not None else [saved.name for saved in theirs]
    if len(known) != len(theirs):
        raise ValueError(f"names has {len(known)} names for {len(theirs)} saved parameters")
    ours = [param for group in groups for param in group["params"]]
    wanted = [name for group in groups for name in names_of(group)]
    if all(known) and all(wanted):
        # Adam_mini keeps names in lower case
        fold: Callable[[str], str] = str.lower if found.source == "adam_mini" else str
        by_name = {
            fold(canonical_name(name)): saved for name, saved in zip(known, theirs, strict=True)
        }
        if len(by_name) != len(theirs) or len({*map(fold, wanted)}) != len(wanted):
            raise ValueError("two parameters have the same name (adam_mini keeps lower case only)")
        if missing := [name for name in wanted if fold(name) not in by_name]:
            raise ValueError(
                f"the state dict knows no parameter named {missing[0]!r} ({len(missing)} such; it "
                f"has {_listed(list(by_name)[:3])}, ...); import the state of the same model"
            )
        _tell_of_unused(by_name, {*map(fold, wanted)})
        return {id(p): by_name[fold(name)] for p, name in zip(ours, wanted, strict=True)}

    sizes = [len(group["params"]) for group in groups]
    their_sizes = [len(group) for group in found.groups]
    one_each = len(sizes) == 1 and {*their_sizes} == {1}
    if len(ours) != len(theirs) or not (sizes == their_sizes or one_each):
        raise ValueError(
            f"parameters without names are matched by order, but the state dict has groups of "
            f"{their_sizes} parameters and this optimizer of {sizes}; pass names=, the names of "
            "the saved parameters in their order, and build AMSF from the model"
        )
    return {id(p): saved for p, saved in zip(ours, theirs, strict=True)}


def _tell_of_unused(by_name: Mapping[str, Saved], wanted: set[str]) -> None:
    unused = [name for name, s in by_name.items() if s.step and name not in wanted]
    if unused:
        logger.warning(
            "state of %d parameters that this optimizer does not train is left out (%s, ...)",
            len(unused),
            unused[0],
        )


def _listed(names: Any) -> str:
    return ", ".join(repr(str(name)) for name in names)
