"""Where the numbers lie: one producer of pieces per sharding system, chosen only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from amsf_dist.shards.flat import FlatSlice, flat_layout
from amsf_dist.shards.fsdp1 import flat_slices, is_flat, reshard
from amsf_dist.shards.fsdp2 import fsdp2
from amsf_dist.shards.fsdp2 import on_paper as fsdp2_on_paper
from amsf_dist.shards.layout import Axis, Cut, Layout, Part, Piece
from amsf_dist.shards.others import with_others
from amsf_dist.shards.own_groups import with_own_group
from amsf_dist.shards.replicated import replicated
from amsf_dist.shards.values import copy_into, whole
from amsf_dist.shards.vector import line_shape, vector_shape
from amsf_dist.shards.zero import is_partitioned

__all__ = [
    "Axis",
    "Cut",
    "FlatSlice",
    "Flats",
    "Layout",
    "Part",
    "Piece",
    "copy_into",
    "flats_of",
    "forget_gathered",
    "is_partitioned",
    "line_shape",
    "locate",
    "on_paper",
    "parameters_in",
    "vector_shape",
    "whole",
    "with_own_group",
]

Flats = Mapping[Tensor, Sequence[FlatSlice]]
"""What only the module or the engine tells: which parts of which parameters lie in a tensor."""


def flats_of(model: nn.Module) -> Flats:
    """Visible tensors of the model that are slices of flat parameters; most models have none."""
    return flat_slices(model)


def forget_gathered(model: nn.Module) -> None:
    """Drop whole weights that a wrapper keeps from the last forward.

    FSDP leaves the root's parameters gathered after a forward, for the backward to come. When what
    the shards hold changes without one, the next forward would go on with the old weights.
    """
    reshard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def parameters_in(name: str, param: Tensor, flats: Flats) -> list[tuple[str, tuple[int, ...]]]:
    """Canonical name and whole shape of every parameter in one visible tensor.

    Args:
        name: of the visible tensor, "" when unknown.
        param: what the optimizer was given.
        flats: from `flats_of`.

    Raises:
        ValueError: it is a slice of an FSDP1 flat parameter, and no module told of which.
    """
    if param in flats:
        return [(flat.name, flat.shape) for flat in flats[param]]
    if is_flat(param):
        raise ValueError(
            f"{name or 'a parameter'} is a slice of an FSDP1 flat parameter, and a slice does "
            "not tell which rows it holds: pass the wrapped model, AMSF(model, ...)"
        )
    return [(name, tuple(param.shape))]


def locate(parts: Sequence[Part], param: Tensor, flats: Flats) -> Layout:
    """Which numbers of a visible tensor lie on this rank.

    Args:
        parts: the parameters in it, in the order of `parameters_in`.
        param: what the optimizer was given; a DTensor under FSDP2 and tensor parallel.
        flats: from `flats_of`.
    """
    if param not in flats:
        parameters_in(parts[0].name, param, flats)  # raises where the module should have told of it

    def produce(parts: Sequence[Part], places: Sequence[int]) -> Layout:
        if param in flats:
            return flat_layout(parts, [flats[param][place] for place in places])
        (part,) = parts
        return fsdp2(part, param) if isinstance(param, DTensor) else replicated(part)

    return with_others(parts, produce)


def on_paper(part: Part, mesh_shape: Sequence[int]) -> Layout:
    """What the first rank of a mesh would hold under FSDP2; no processes are needed.

    Args:
        part: the parameter.
        mesh_shape: ranks per mesh dim; rows over the last, replicas over those before it.
    """
    return with_others([part], lambda ways, _: fsdp2_on_paper(ways[0], mesh_shape))
