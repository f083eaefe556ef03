"""A saved optimizer state as numbers of parameters, whoever saved it and however it was cut."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amsf_dist.blocks import canonical_name
from amsf_dist.rules import RULES
from amsf_dist.state import MOMENTS

__all__ = [
    "WEIGHT",
    "Fragment",
    "Saved",
    "Vector",
    "fits",
    "kind_of",
    "of_files",
    "of_full",
    "optimizer_files",
]

WEIGHT = "weight"
"""Key of the weights beside the state's own keys."""
_PIECES = "amsf_pieces"


@dataclass(frozen=True)
class Vector:
    """Moments of neighbouring blocks of one parameter; the first belongs to `first_block`."""

    values: Tensor
    first_block: int


@dataclass(frozen=True)
class Fragment:
    """Numbers [start, stop) of one parameter, row-major as stored.

    Attributes:
        start: first number.
        stop: end.
        lines: key -> [stop - start] numbers; `WEIGHT` and the lines of the rule.
        moments: key -> block moments.
    """

    start: int
    stop: int
    lines: Mapping[str, Tensor]
    moments: Mapping[str, Vector]


@dataclass
class Saved:
    """Everything that was saved of the optimizer.

    Attributes:
        fragments: per canonical parameter name.
        shapes: of the parameters.
        moment_shapes: of their block vectors in a state dict of one process, by key.
        block_numel: numbers per block of every parameter, by the key of the moments.
        counters: per parameter: counter -> value.
        groups: options of the parameter groups.
        group_of: parameter name -> index of its group.
    """

    fragments: dict[str, list[Fragment]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    moment_shapes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    block_numel: dict[str, dict[str, int]] = field(default_factory=dict)
    counters: dict[str, dict[str, float]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    group_of: dict[str, int] = field(default_factory=dict)

    def numel(self, name: str) -> int:
        """Numbers in a parameter."""
        return math.prod(self.shapes[name])

    def read(self, name: str, key: str, start: int, stop: int, out: Tensor) -> bool:
        """Copy numbers [start, stop) of a parameter's line into `out`.

        Returns:
            False where that was not saved of this parameter.

        Raises:
            ValueError: only a part of them was saved: files are missing.
        """
        found = 0
        for part in self.fragments[name]:
            first, last = max(part.start, start), min(part.stop, stop)
            if first < last and key in part.lines:
                values = part.lines[key][first - part.start : last - part.start]
                out[first - start : last - start].copy_(values)
                found += last - first
        if 0 < found < stop - start:
            raise ValueError(
                f"{name}: {found} of {stop - start} numbers of {key!r} are in the checkpoint; are "
                "files of some ranks missing?"
            )
        return found > 0 or start == stop

    def read_moments(self, name: str, key: str, first: int, out: Tensor) -> None:
        """Copy the moments of blocks [first, first + len(out)) into `out`."""
        for part in self.fragments[name]:
            vector = part.moments[key]
            begin = max(vector.first_block, first)
            end = min(vector.first_block + vector.values.numel(), first + out.numel())
            if begin < end:
                values = vector.values[begin - vector.first_block : end - vector.first_block]
                out[begin - first : end - first].copy_(values)

    def whole_moments(self, name: str, key: str) -> Tensor:
        """[num_blocks] all moments of a parameter under one key."""
        dtype = self.fragments[name][0].moments[key].values.dtype
        out = torch.zeros(self.numel(name) // self.block_numel[name][key], dtype=dtype)
        self.read_moments(name, key, 0, out)
        return out


def optimizer_files(folder: Path) -> list[Path]:
    """The files in a checkpoint's folder that hold optimizer state, in the order of the ranks."""
    partitions = sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank)
    return partitions or sorted(folder.glob("mp_rank_*_model_states.pt"))


def _rank(path: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(found.group(1)) if found else 0


def of_files(folder: Path) -> Saved | None:
    """Read a DeepSpeed checkpoint, of any stage and any number of ranks; numbers stay on disk.

    Args:
        folder: of one tag.

    Returns:
        None where another optimizer wrote it.
    """
    saved = Saved()
    for path in optimizer_files(folder):
        # memory-mapped: what is not copied is not read
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        base, masters = _base_and_masters(content)
        if base is None or _PIECES not in base:
            return None
        _add(saved, base, masters)
    return saved if saved.fragments else None


def _base_and_masters(content: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[Tensor]]:
    """Our state dict in one file of a checkpoint, and the weights that its state lies over."""
    wrapper = content.get("optimizer_state_dict") or content.get("optimizer")
    if not isinstance(wrapper, Mapping):
        return None, []
    base: Any = wrapper.get("base_optimizer_state") or wrapper.get("optimizer_state_dict")
    if base is None and _PIECES in wrapper:  # fp32 without ZeRO: the module has the weights
        module = {canonical_name(name): value for name, value in content["module"].items()}
        return dict(wrapper), [module[piece[0]["name"]] for piece in wrapper[_PIECES]]
    for key in ("single_partition_of_fp32_groups", "fp32_flat_groups"):
        if key in wrapper:
            return base, list(wrapper[key])
    return base, [master for group in wrapper.get("fp32_groups", ()) for master in group]


def fits(path: Path, pieces: Any, kind: str) -> bool:
    """Whether an engine can load one rank's file as it is.

    Args:
        path: that this rank's engine would read.
        pieces: of the engine, on this rank.
        kind: of the engine's wrapper, see `kind_of`.
    """
    if not path.is_file():
        return False
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    base, _ = _base_and_masters(content)
    wrapper = content.get("optimizer_state_dict") or content.get("optimizer")
    return base is not None and base.get(_PIECES) == pieces and kind_of(wrapper) == kind


def kind_of(wrapper: Any) -> str:
    """Which of DeepSpeed's wrappers this is, or has written this state dict."""

    def has(name: str) -> bool:
        return name in wrapper if isinstance(wrapper, Mapping) else hasattr(wrapper, name)

    if has("fp32_flat_groups") or has("fp32_partitioned_groups_flat"):
        return "zero 3"
    if has("fp32_groups_flat_partition"):
        return "bf16"
    if has("single_partition_of_fp32_groups"):
        return "zero 1/2" if not isinstance(wrapper, Mapping) or has("zero_stage") else "bf16"
    return "half" if has("fp32_groups") else "fp32"


def _add(saved: Saved, base: Mapping[str, Any], masters: Sequence[Tensor]) -> None:
    saved.groups = [dict(group) for group in base["param_groups"]]
    group_of = {
        index: number for number, group in enumerate(saved.groups) for index in group["params"]
    }
    for index, (pieces, master) in enumerate(zip(base[_PIECES], masters, strict=True)):
        state = base["state"][index]
        counters = _counters(state, saved.groups[group_of[index]])
        lines = _lines(master, state, counters)
        for piece in pieces:
            name, count = piece["name"], piece["stop"] - piece["start"]
            here = slice(piece["offset"], piece["offset"] + count)
            moments = {
                key: Vector(
                    state[key].reshape(-1)[at["first_moment"] :][: at["num_moments"]],
                    at["first_block"],
                )
                for key, at in piece["moments"].items()
            }
            fragment = Fragment(
                piece["start"],
                piece["stop"],
                {key: line[here] for key, line in lines.items()},
                moments,
            )
            saved.fragments.setdefault(name, []).append(fragment)
            saved.shapes[name] = tuple(piece["shape"])
            known = piece["moments"].items()
            saved.moment_shapes[name] = {key: tuple(at["shape"]) for key, at in known}
            saved.block_numel[name] = {key: at["block_numel"] for key, at in known}
            saved.counters[name] = counters
            saved.group_of[name] = group_of[index]


def of_full(
    weights: Mapping[str, Tensor], state_dict: Mapping[str, Any], names: Sequence[str] = ()
) -> Saved:
    """Read full state dicts: of one process, or of FSDP2's `full_state_dict=True`.

    Args:
        weights: parameter name -> whole tensor; what the parameters held when both were saved.
        state_dict: whole tensors, keyed by name, or by number with names in its groups.
        names: of its parameters in the order of its groups, where it has none.
    """
    saved = Saved(groups=[dict(group) for group in state_dict["param_groups"]])
    given = iter(names)
    for number, group in enumerate(saved.groups):
        for place, key in enumerate(group["params"]):
            known = group.get("param_names")
            name = known[place] if known else key if isinstance(key, str) else next(given)
            state = state_dict["state"].get(key)
            if state is None or name not in weights:
                raise ValueError(f"{name}: it has no state, or no weights, in what was given")
            numel, counters = weights[name].numel(), _counters(state, group)
            lines = _lines(weights[name], state, counters)
            vectors = {key: state[key] for key in MOMENTS if key in state}
            moments = {key: Vector(value.reshape(-1), 0) for key, value in vectors.items()}
            saved.fragments[name] = [Fragment(0, numel, lines, moments)]
            saved.shapes[name] = tuple(weights[name].shape)
            saved.moment_shapes[name] = {key: tuple(v.shape) for key, v in vectors.items()}
            saved.block_numel[name] = {
                key: numel // max(1, value.numel()) for key, value in vectors.items()
            }
            saved.counters[name] = counters
            saved.group_of[name] = number
    return saved


def _counters(state: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(state[key]) for key in RULES[group["averaging"]].counters}


def _lines(
    weight: Tensor, state: Mapping[str, Any], counters: Mapping[str, float]
) -> dict[str, Tensor]:
    lines = {
        key: value.reshape(-1)
        for key, value in state.items()
        if key not in MOMENTS and key not in counters
    }
    return {**lines, WEIGHT: weight.reshape(-1)}
