"""DTensor parameters: FSDP2 (`fully_shard`), HSDP, tensor parallel and their products.

Everything is decided from the global shape, the mesh and the placements, never from what this rank
happens to hold, so that every rank decides alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from amsf_dist.blocks import Blocks
from amsf_dist.shards.layout import Axis, Cut, Layout, Part, Piece, Span
from amsf_dist.shards.runs import box_runs, local_blocks
from amsf_dist.shards.seams import seam_everywhere, seaming_dims
from amsf_dist.shards.vector import line_shape, vector_shape

__all__ = ["cut_mesh_dims", "fsdp2", "on_paper"]

_SHARDS = (Shard, _StridedShard)


def fsdp2(part: Part, param: DTensor) -> Layout:
    """The box of the parameter that lies on this rank.

    Raises:
        ValueError: a placement is neither `Shard` nor `Replicate`, or this rank holds another part
            than the placements say.
    """
    mesh, blocks = param.device_mesh, part.blocks
    placements = _in_line_order(part.name, param.placements, blocks)
    line, vector = line_shape(part.shape, blocks), vector_shape(part.shape, blocks)
    offsets, lengths = _box(line, mesh, placements)
    if (here := line_shape(param.to_local().shape, blocks)) != lengths:
        raise ValueError(
            f"{part.name or 'a parameter'}: this rank holds a part of shape {here}, its placements "
            f"{param.placements} say {lengths}; shard it with fully_shard, parallelize_module or "
            "distribute_tensor before building the optimizer"
        )
    cut = cut_mesh_dims(line, mesh.shape, placements, blocks)

    # a mesh dim of one rank cuts nothing, but may name a dim that the vector does not have
    vector_placements = [
        Replicate() if dim in cut or not isinstance(p, _SHARDS) or p.dim >= len(vector) else p
        for dim, p in enumerate(placements)
    ]
    vector_offsets, vector_lengths = _box(vector, mesh, vector_placements)
    runs = local_blocks(
        box_runs(line, offsets, lengths, blocks.block_numel), vector, vector_offsets, vector_lengths
    )

    def as_state(moments: Tensor) -> Tensor:
        # shape and stride are needed where the last ranks hold less than the others
        return DTensor.from_local(
            moments.view(vector_lengths),
            mesh,
            vector_placements,
            run_check=False,
            shape=torch.Size(vector),
            stride=_contiguous_stride(vector),
        )

    axes = {
        dim: _axis(mesh, dim, placements)
        for dim, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    }
    seaming = seaming_dims(line, _splits(mesh.shape, placements))
    num_blocks = math.prod(vector_lengths)
    every = range(num_blocks)
    return Layout(
        pieces=(
            Piece(
                part,
                runs,
                0,
                num_blocks,
                cut_blocks=num_blocks if cut else 0,
                spans=(Span(0, line, tuple(offsets), tuple(lengths)),),
                seam=seam_everywhere([axes[dim] for dim in seaming], math.prod(line)),
                kept=Span(0, vector, vector_offsets, vector_lengths),
            ),
        ),
        cuts=tuple(Cut(axes[dim], num_blocks, every, every) for dim in cut),
        spread=tuple(axes.values()),
        local=_local,
        as_state=as_state,
        first=0 if runs and not any(offsets) else None,
    )


def on_paper(
    part: Part, mesh_shape: Sequence[int], placements: Sequence[Placement] | None = None
) -> Layout:
    """What the first rank of a mesh would hold; no processes are needed.

    Args:
        part: the parameter.
        mesh_shape: ranks per mesh dim.
        placements: per mesh dim; None: as FSDP2 does, rows over the last mesh dim, replicas over
            those before it.
    """
    blocks = part.blocks
    if placements is None:
        rows = Shard(0) if part.shape else Replicate()
        placements = [*(Replicate() for _ in mesh_shape[1:]), rows]
    placements = _in_line_order(part.name, placements, blocks)
    line, vector = line_shape(part.shape, blocks), vector_shape(part.shape, blocks)
    cut = cut_mesh_dims(line, mesh_shape, placements, blocks)

    def first_box(shape: Sequence[int], left_whole: Sequence[int]) -> list[int]:
        lengths = list(shape)
        for mesh_dim, placement in enumerate(placements):
            if isinstance(placement, _SHARDS) and mesh_dim not in left_whole:
                if placement.dim < len(lengths):
                    lengths[placement.dim] = -(-lengths[placement.dim] // mesh_shape[mesh_dim])
        return lengths

    lengths, vector_lengths = first_box(line, ()), first_box(vector, cut)
    runs = local_blocks(
        box_runs(line, [0] * len(line), lengths, blocks.block_numel),
        vector,
        [0] * len(vector),
        vector_lengths,
    )
    num_blocks = math.prod(vector_lengths)
    span = Span(0, line, (0,) * len(line), tuple(lengths))
    cut_blocks = num_blocks if cut else 0
    kept = Span(0, vector, (0,) * len(vector), tuple(vector_lengths))
    piece = Piece(part, runs, 0, num_blocks, cut_blocks=cut_blocks, spans=(span,), kept=kept)
    return Layout((piece,))


def _axis(mesh: DeviceMesh, dim: int, placements: Sequence[Placement]) -> Axis:
    """The ranks over which a mesh dim spreads a parameter, its replicas (HSDP) included.

    Each replica could add up its own shards. But two collectives may round differently, and then
    replicas would drift apart for ever; the results of one collective are the same everywhere.
    """
    replicating = [
        left for left in range(dim) if placements[left].is_replicate() and mesh.size(left) > 1
    ]
    if not replicating:
        return Axis(mesh.get_group(dim), mesh.size(dim), mesh.device_type)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    here = tuple(
        slice(None) if other in (*replicating, dim) else index
        for other, index in enumerate(coordinate)
    )
    ranks = tuple(sorted(mesh.mesh[here].flatten().tolist()))
    replicas = math.prod(mesh.size(left) for left in replicating)
    return Axis(_group_of(ranks, dist.group.WORLD), len(ranks), mesh.device_type, replicas)


@cache
def _group_of(ranks: tuple[int, ...], world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A process group of these ranks, the same one for all parameters."""
    if len(ranks) == world.size():
        return world
    group: dist.ProcessGroup = dist.new_group(list(ranks), use_local_synchronization=True)
    return group


def cut_mesh_dims(
    line: Sequence[int],
    mesh_shape: Sequence[int],
    placements: Sequence[Placement],
    blocks: Blocks,
) -> tuple[int, ...]:
    """Mesh dims over which the parameter's block sums must be added up.

    Args:
        line: the parameter's shape in line order.
        mesh_shape: ranks per mesh dim.
        placements: per mesh dim, tensor dims in line order.
        blocks: how the line is cut.
    """
    vector = vector_shape(line, _as_stored(blocks))
    by_dims = tuple(line[: len(vector)]) == vector  # blocks are what remains of the leading dims
    sharding = [
        (mesh_dim, placement.dim)
        for mesh_dim, placement in enumerate(placements)
        if isinstance(placement, _SHARDS) and mesh_shape[mesh_dim] > 1
    ]
    if blocks.kind == "mean":
        return tuple(mesh_dim for mesh_dim, _ in sharding)
    if by_dims:
        return tuple(mesh_dim for mesh_dim, dim in sharding if dim >= len(vector))

    row_numel = math.prod(line[1:])
    aligned = row_numel > 0 and blocks.block_numel % row_numel == 0
    rows_per_block = blocks.block_numel // row_numel if aligned else 1
    rows = set(line[:1])  # that a rank may hold: the last ones of every cut may have fewer
    for mesh_dim in _in_split_order(placements):
        if (mesh_dim, 0) in sharding:
            rows = {part for whole in rows for part in _parts(whole, mesh_shape[mesh_dim])}
    aligned = aligned and all(part % rows_per_block == 0 for part in rows)
    return tuple(mesh_dim for mesh_dim, dim in sharding if dim > 0 or not aligned)


def _box(
    shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and lengths of the part that lies here, as `torch.chunk` cuts it.

    torch's own function for it (2.13) is wrong where tensor parallel cuts unevenly before FSDP, as
    7 rows on 2 and then 3 ranks: `fully_shard` chunks what tensor parallel left on the rank.
    """
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            "a parameter lives on ranks that this one does not belong to; give the optimizer "
            "only the parameters of its own rank"
        )
    offsets, lengths = [0] * len(shape), list(shape)
    for mesh_dim in _in_split_order(placements):
        placement = placements[mesh_dim]
        if isinstance(placement, _SHARDS):
            dim = placement.dim
            chunk = _chunk(lengths[dim], mesh.size(mesh_dim))
            start = min(coordinate[mesh_dim] * chunk, lengths[dim])
            offsets[dim] += start
            lengths[dim] = min(chunk, lengths[dim] - start)
    return tuple(offsets), tuple(lengths)


def _chunk(length: int, parts: int) -> int:
    return -(-length // parts)


def _parts(length: int, parts: int) -> set[int]:
    """Lengths of the chunks that are not empty."""
    chunk = _chunk(length, parts)
    return {chunk, length % chunk} - {0} if chunk else set()


def _in_split_order(placements: Sequence[Placement]) -> list[int]:
    """Mesh dims in the order in which they cut.

    From left to right; but tensor parallel cuts before FSDP although it stands behind it in the
    mesh, which FSDP tells by marking its own placement as strided.
    """
    strided = [dim for dim, p in enumerate(placements) if isinstance(p, _StridedShard)]
    return [dim for dim in range(len(placements)) if dim not in strided] + strided[::-1]


def _splits(
    mesh_shape: Sequence[int], placements: Sequence[Placement]
) -> list[tuple[int, int, int]]:
    """(mesh dim, tensor dim, ranks) of what cuts, in the order in which it does."""
    return [
        (mesh_dim, placement.dim, mesh_shape[mesh_dim])
        for mesh_dim in _in_split_order(placements)
        if isinstance(placement := placements[mesh_dim], _SHARDS) and mesh_shape[mesh_dim] > 1
    ]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as_stored(blocks: Blocks) -> Blocks:
    return Blocks(blocks.kind, blocks.block_numel)


def _in_line_order(
    name: str, placements: Sequence[Placement], blocks: Blocks
) -> tuple[Placement, ...]:
    """The placements of the parameter with its dims permuted to line order."""
    for placement in placements:
        if not placement.is_replicate() and not isinstance(placement, _SHARDS):
            raise ValueError(
                f"{name or 'a parameter'}: AMSF understands Shard and Replicate placements, not "
                f"{placement!r}; redistribute the parameter before building the optimizer"
            )
    if blocks.order is None:
        return tuple(placements)
    return tuple(_on_dim(placement, blocks.order) for placement in placements)


def _on_dim(placement: Placement, order: Sequence[int]) -> Placement:
    if isinstance(placement, _StridedShard):
        return _StridedShard(order.index(placement.dim), split_factor=placement.split_factor)
    if isinstance(placement, Shard):
        return Shard(order.index(placement.dim))
    return placement


def _contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
