"""The shardings that the parity tests run through, and how a run under one of them is read out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from clipping import clip_
from models import Attention, GatedMLP, Layer, Shape, Transformer, batch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from amsf_dist import AMSF, kernels
from amsf_dist.blocks import canonical_name
from amsf_dist.shards import Part
from amsf_dist.state import MOMENT, MOMENTS

STEPS = 20
OPTIONS: dict[str, Any] = {"lr": 5e-3, "weight_decay": 0.1, "warmup_steps": 5, "r": 1.0}

GLOBAL_BATCH = 12  # rows; every rank takes its part, so 1, 2, 3, 4 ranks see the same batch

SHAPES = {
    # q heads of 8 rows: aligned at 2 and 4 ranks, k heads cut at 4, both cut and uneven at 3
    "even": Shape(vocab=24, dim=32, heads=4, kv_heads=2, head_dim=8, hidden=40),
    # 6 query rows and 2 key rows: ranks without a part at 3 and 4 ranks; everything else uneven
    "uneven": Shape(vocab=23, dim=10, heads=3, kv_heads=1, head_dim=2, hidden=13),
}


def loss_of(model: nn.Module, vocab: int, step: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """Mean loss of one rank's part of the global batch."""
    tokens = batch(step, vocab, size=GLOBAL_BATCH).chunk(world_size)[rank]
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def single(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: Transformer, **options: Any) -> nn.Module:
    """A unit per layer; embedding and head are tied and stay in the root's unit."""
    options.setdefault("mesh", init_device_mesh("cpu", (dist.get_world_size(),)))
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def shard1(model: Transformer) -> nn.Module:
    """Columns instead of rows, where they divide evenly (FSDP2 asks for that)."""
    world_size = dist.get_world_size()

    def columns(param: nn.Parameter) -> Shard | None:
        return Shard(1) if param.dim() == 2 and param.shape[1] % world_size == 0 else None

    return fsdp2(model, shard_placement_fn=columns)


def hsdp(model: Transformer) -> nn.Module:
    shape = (2, dist.get_world_size() // 2)
    return fsdp2(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")))


def two_meshes(model: Transformer) -> nn.Module:
    """Matrices over all ranks, vectors over pairs of them: every parameter has its own mesh."""
    world_size = dist.get_world_size()
    everyone = init_device_mesh("cpu", (world_size,))
    for layer in model.model.layers:
        fully_shard(layer.mlp, mesh=everyone)
    pairs = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replica", "shard"))
    return fully_shard(model, mesh=pairs)


def offloaded(model: Transformer) -> nn.Module:
    return fsdp2(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def checkpointed(model: Transformer) -> nn.Module:
    for layer in model.model.layers:
        checkpoint_wrapper.apply_activation_checkpointing(
            layer, check_fn=lambda module: isinstance(module, (Attention, GatedMLP))
        )
    return fsdp2(model)


def tensor_parallel(model: Transformer, mesh: DeviceMesh | None = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        layer.self_attn.num_heads //= mesh.size()
        columns, rows = ColwiseParallel(), RowwiseParallel()
        plan = {f"self_attn.{name}_proj": columns for name in "qkv"}
        plan |= {"self_attn.o_proj": rows, "mlp.gate_proj": columns, "mlp.up_proj": columns}
        parallelize_module(layer, mesh, {**plan, "mlp.down_proj": rows})
    return model


def tensor_parallel_fsdp2(model: Transformer) -> nn.Module:
    shape = (dist.get_world_size() // 2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    return fsdp2(tensor_parallel(model, mesh["tensor"]), mesh=mesh["data"])


def fsdp1(strategy: str, use_orig_params: bool) -> Callable[[Transformer], nn.Module]:
    def wrap(model: Transformer) -> nn.Module:
        options: dict[str, Any] = {}
        if strategy == "HYBRID_SHARD":
            shape = (2, dist.get_world_size() // 2)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard"))
            options["device_mesh"] = mesh
        return FullyShardedDataParallel(
            model,
            sharding_strategy=ShardingStrategy[strategy],
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
            auto_wrap_policy=ModuleWrapPolicy({Layer}),
            **options,
        )

    return wrap


@dataclass(frozen=True)
class Layout:
    """A way to spread a model over ranks, and the numbers of ranks it is tested with."""

    wrap: Callable[[Any], nn.Module]
    world_sizes: tuple[int, ...]
    shapes: tuple[str, ...] = ("even", "uneven")
    tensor_parallel: int = 1  # ranks that see the same part of the batch


LAYOUTS: dict[str, Layout] = {
    "ddp": Layout(ddp, (2,)),
    "fsdp2": Layout(fsdp2, (2, 3, 4)),
    "fsdp2 Shard(1)": Layout(shard1, (2, 4)),
    "fsdp2 HSDP": Layout(hsdp, (4,)),
    "fsdp2 two meshes": Layout(two_meshes, (4,)),
    "fsdp2 CPU offload": Layout(offloaded, (2,), ("uneven",)),
    "fsdp2 activation checkpointing": Layout(checkpointed, (2,), ("uneven",)),
    "tensor parallel": Layout(tensor_parallel, (2,), ("even",), tensor_parallel=2),
    "tensor parallel x fsdp2": Layout(tensor_parallel_fsdp2, (4,), ("even",), tensor_parallel=2),
} | {
    f"fsdp1 {strategy} {'original' if original else 'flat'}": Layout(
        fsdp1(strategy, original), world_sizes, ("uneven",)
    )
    for strategy, world_sizes in {
        "FULL_SHARD": (2, 3, 4),
        "SHARD_GRAD_OP": (3,),
        "NO_SHARD": (2,),
        "HYBRID_SHARD": (4,),
    }.items()
    for original in (True, False)
}


def train(
    model: nn.Module,
    optimizer: Any,
    vocab: int,
    steps: range,
    *,
    clip: float | None = None,
    tensor_parallel: int = 1,
) -> None:
    """Plain training on this rank's part of every batch."""
    rank, world_size = 0, 1
    if dist.is_initialized():
        rank = dist.get_rank() // tensor_parallel
        world_size = dist.get_world_size() // tensor_parallel
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, vocab, step, rank, world_size).backward()
        if clip is not None:
            clip_(model, clip)
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def weights(model: nn.Module, optimizer: Any = None) -> dict[str, Tensor]:
    """Canonical name -> whole parameter."""
    if isinstance(model, FullyShardedDataParallel):
        flats = optimizer._flats
        return assembled([(flat, p.detach().view(-1)) for p in flats for flat in flats[p]])
    return {canonical_name(name): whole(param) for name, param in model.named_parameters()}


def moments(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Canonical name (and key) -> second moments of all blocks."""
    if isinstance(model, FullyShardedDataParallel):
        return {
            tagged(name, MOMENTS[number]): values
            for number in range(max(len(h.partitions) for h in optimizer.holdings))
            for name, values in moments_of_flats(optimizer, number).items()
        }
    return {
        tagged(canonical_name(name), key): whole(value).flatten()
        for name, param in model.named_parameters()
        for key, value in optimizer.state[param].items()
        if key in MOMENTS
    }


def tagged(name: str, key: str) -> str:
    return name if key == MOMENT else f"{name} {key}"


def moments_of_flats(optimizer: Any, number: int) -> dict[str, Tensor]:
    """Canonical name -> second moments of all blocks of one partition, if it has that."""
    flats, parts, spread = optimizer._flats, {}, []
    for holding in optimizer.holdings:
        for partition in holding.partitions[number : number + 1]:
            mine = {piece.part.name: piece.part for piece in partition.layout.pieces}
            values = kernels.spread(holding, partition).view(-1)
            spread += [(flat, values) for flat in flats[holding.param] if flat.name in mine]
            parts |= mine
    return {
        name: in_line_order(value, parts[name]).reshape(parts[name].num_blocks, -1)[:, 0]
        for name, value in assembled(spread).items()
    }


def in_line_order(value: Tensor, part: Part) -> Tensor:
    return value if part.blocks.order is None else value.permute(part.blocks.order)


def assembled(slices: list[tuple[Any, Tensor]]) -> dict[str, Tensor]:
    """Whole parameters from the intervals that all ranks hold of flat ones."""
    mine = [
        (flat.name, flat.shape, flat.start, memory[flat.offset :][: flat.stop - flat.start].clone())
        for flat, memory in slices
    ]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    found: dict[str, Tensor] = {}
    for name, shape, start, values in (entry for rank in gathered for entry in rank):
        line = found.setdefault(name, values.new_full((math.prod(shape),), torch.nan))
        line[start : start + values.numel()] = values
    shapes = {name: shape for name, shape, _, _ in mine}
    return {name: line.view(shapes[name]) for name, line in found.items()}


def run(
    layout: str | None,
    shape: str,
    dtype: torch.dtype,
    rules: list[tuple[str, str]],
    clip: float,
    steps: int = STEPS,
) -> Any:
    """Train under every (blocks, averaging): y, x and second moments, and the plan's figures."""
    results = {}
    under = LAYOUTS[layout] if layout else Layout(single, (1,))
    for blocks, averaging in rules:
        model = under.wrap(Transformer(SHAPES[shape], dtype=dtype))
        optimizer = AMSF(model, blocks=blocks, averaging=averaging, **OPTIONS)
        vocab, parallel = SHAPES[shape].vocab, under.tensor_parallel
        train(model, optimizer, vocab, range(steps), clip=clip, tensor_parallel=parallel)
        at_y, second = weights(model, optimizer), moments(model, optimizer)
        sums = optimizer._ready().units[0].sums
        with optimizer.averaged_parameters():
            values = {"y": at_y, "x": weights(model, optimizer), "v": second}
        results[blocks, averaging] = values, (sums.num_collectives, sums.num_floats)
    return results


def relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor], leave_out: str = "") -> Any:
    """(largest error over names, its name): norm of the difference over norm, per tensor."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    errors = []
    for name, value in ours.items():
        if leave_out and name.endswith(leave_out):
            continue
        a, b = value.double().flatten(), theirs[name].double().flatten()
        norm = float(torch.linalg.vector_norm(b))
        error = float(torch.linalg.vector_norm(a - b)) / (norm or 1.0)
        errors.append((error if error == error else math.inf, name))
    return max(errors)
