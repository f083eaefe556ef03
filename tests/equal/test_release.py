"""Promise 3: gradient release equals the ordinary step, and one unit's gradients live at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import (
    LAYOUTS,
    OPTIONS,
    SHAPES,
    fsdp2,
    loss_of,
    moments,
    relative_error,
    single,
    train,
    weights,
)
from layouts import Layout as Under
from models import Transformer, assert_same_bits
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

from amsf_dist import AMSF, enable_gradient_release

STEPS = 8
NOISE = "k_proj.bias"
TOLERANCE = {"y": 1e-5, "x": 1e-5, "v": 1e-6}
ALONE = Under(single, (1,))
BLOCKS = [("auto", "schedule_free"), ("factored", "ema")]


def everything(model: nn.Module, optimizer: AMSF) -> dict[str, Any]:
    found = {"y": weights(model), "v": moments(model, optimizer)}
    with optimizer.averaged_parameters():
        return {**found, "x": weights(model)}


def both(function: Any, *args: Any) -> Any:
    """What it gives with release and without, in the same processes."""
    return function(*args, True), function(*args, False)


def released(layout: str | None, shape: str, release: bool) -> Any:
    under, found = LAYOUTS[layout] if layout else ALONE, []
    for blocks, averaging in BLOCKS:
        model = under.wrap(Transformer(SHAPES[shape], dtype=torch.float32))
        optimizer = AMSF(model, blocks=blocks, averaging=averaging, **OPTIONS)
        handle = enable_gradient_release(model, optimizer) if release else None
        parallel = under.tensor_parallel
        train(model, optimizer, SHAPES[shape].vocab, range(STEPS), tensor_parallel=parallel)
        found.append(everything(model, optimizer))
        if handle is not None:
            units = optimizer._ready().units
            assert len(units) >= 2
            assert all(unit.sums.num_collectives <= 2 for unit in units)
            assert optimizer._ready().units is units
            handle.remove()
            train(model, optimizer, SHAPES[shape].vocab, range(1), tensor_parallel=parallel)
            assert any(param.grad is not None for param in model.parameters())
    return found


@pytest.mark.parametrize(
    ("layout", "world_size", "shape"),
    [
        (None, 1, "uneven"),
        ("fsdp2", 3, "uneven"),
        ("fsdp2 Shard(1)", 2, "uneven"),
        ("fsdp2 HSDP", 4, "uneven"),
        ("fsdp2 two meshes", 4, "uneven"),
        ("fsdp2 CPU offload", 2, "uneven"),
        ("fsdp2 activation checkpointing", 2, "uneven"),
        ("tensor parallel x fsdp2", 4, "even"),
    ],
)
def test_release_is_the_ordinary_step(layout: str | None, world_size: int, shape: str) -> None:
    found, ordinary = run_ranks(world_size, both, released, layout, shape)[0]
    for ours, theirs in zip(found, ordinary, strict=True):
        for what, bound in TOLERANCE.items():
            error, name = relative_error(ours[what], theirs[what], NOISE)
            assert error <= bound, f"{layout}: {what} of {name} differs by {error:.1e}"


@pytest.mark.parametrize(
    ("dtype", "weight", "state"),
    [
        (torch.bfloat16, "auto", "bf16"),
        (torch.bfloat16, "stochastic", "int8"),
        (torch.bfloat16, "kahan", "int8"),
        (torch.float32, "auto", "int8"),
    ],
)
def test_every_storage(dtype: torch.dtype, weight: str, state: str) -> None:
    found = []
    for release in (False, True):
        model = Transformer(SHAPES["uneven"], dtype=dtype)
        optimizer = AMSF(model, weight_storage=weight, state_storage=state, **OPTIONS)
        if release:
            enable_gradient_release(model, optimizer)
        train(model, optimizer, SHAPES["uneven"].vocab, range(STEPS))
        found.append(everything(model, optimizer))
    assert_same_bits(found[1], found[0])


class Live:
    """Counts the bytes of the gradients that are alive, by their storages: FSDP's share one."""

    def __init__(self, model: nn.Module) -> None:
        self.peak = 0
        self._seen: dict[StorageWeakRef, int] = {}
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(self._arrived)

    @property
    def now(self) -> int:
        return sum(size for storage, size in self._seen.items() if not storage.expired())

    def _arrived(self, param: torch.Tensor) -> None:
        grad = param.grad
        storage = (grad.to_local() if hasattr(grad, "to_local") else grad).untyped_storage()
        self._seen[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.now)


def peaks(release: bool) -> Any:
    shape = replace(SHAPES["even"], layers=6)
    model: Any = Transformer(shape, dtype=torch.float32)
    if dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model = fsdp2(model, mesh=mesh)
    live = Live(model)
    optimizer = AMSF(model, **OPTIONS)
    if release:
        enable_gradient_release(model, optimizer)
    train(model, optimizer, shape.vocab, range(2))
    units: dict[int, int] = {}
    owner = {}
    for name, module in model.named_modules():
        own = isinstance(module, FSDPModule) or dist.get_world_size() == 1
        owner[name] = id(module) if own else owner[name.rpartition(".")[0]]
        for param in module.parameters(recurse=False):
            local = param.to_local() if hasattr(param, "to_local") else param
            size = local.numel() * local.element_size()
            units[owner[name]] = units.get(owner[name], 0) + size
    everything_at_once = sum(
        (p.to_local() if hasattr(p, "to_local") else p).numel() * 4 for p in model.parameters()
    )
    optimizer.zero_grad()
    return live.peak, live.now, max(units.values()), everything_at_once


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gradients_of_one_unit_live_at_a_time(world_size: int) -> None:
    for (peak, left, unit, everything_at_once), (ordinary, *_) in run_ranks(
        world_size, both, peaks
    ):
        assert peak <= unit < 0.5 * everything_at_once and left == 0
        assert ordinary == everything_at_once


def replicas(release: bool) -> Any:
    """Pure data parallelism that frees gradients: FSDP2 on a mesh of (ranks, 1)."""
    model = Transformer(SHAPES["uneven"], dtype=torch.float32)
    if not release:
        wrapped: nn.Module = DistributedDataParallel(model)
    else:
        shape = (dist.get_world_size(), 1)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard"))
        wrapped = fsdp2(model, mesh=mesh)
    optimizer = AMSF(wrapped, **OPTIONS)
    if release:
        enable_gradient_release(wrapped, optimizer)
    train(wrapped, optimizer, SHAPES["uneven"].vocab, range(STEPS))
    assert all(unit.sums.num_collectives == 0 for unit in optimizer._ready().units)
    return weights(wrapped)


def test_pure_data_parallelism() -> None:
    found, ordinary = run_ranks(2, both, replicas)[0]
    error, name = relative_error(found, ordinary, NOISE)
    assert error <= 1e-5, name


def accumulated(
    layout: str | None, pieces: int, release: bool, mode: str = "exact", averaging: str = ""
) -> Any:
    """Micro-batches with a framework that calls step and zero_grad after (or before) every one."""
    shape = SHAPES["uneven"]
    model = (LAYOUTS[layout] if layout else ALONE).wrap(Transformer(shape, dtype=torch.float32))
    optimizer = AMSF(model, averaging=averaging or "schedule_free", **OPTIONS)
    if release:
        enable_gradient_release(model, optimizer, accumulation=mode)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        for piece in range(pieces):
            optimizer.optimizer_accumulation = piece < pieces - 1
            optimizer.zero_grad()
            part = rank * pieces + piece
            (loss_of(model, shape.vocab, step, part, world_size * pieces) / pieces).backward()
            optimizer.step()
            if piece % 2:
                optimizer.zero_grad()
    return everything(model, optimizer)


@pytest.mark.parametrize(("layout", "world_size"), [(None, 1), ("fsdp2", 2), ("fsdp2 HSDP", 4)])
def test_micro_batches_are_one_batch(layout: str | None, world_size: int) -> None:
    (whole,) = run_ranks(world_size, accumulated, layout, 1, False)[:1]
    for found in run_ranks(world_size, both, accumulated, layout, 3)[0]:
        for what, bound in TOLERANCE.items():
            error, name = relative_error(found[what], whole[what], NOISE)
            assert error <= bound, f"{layout}: {what} of {name} differs by {error:.1e}"


def clipped(layout: str | None, options: dict[str, Any], release: bool, by_torch: bool) -> Any:
    under, shape = (LAYOUTS[layout] if layout else ALONE), SHAPES["even"]
    model = under.wrap(Transformer(shape, dtype=torch.float32))
    optimizer = AMSF(model, **({} if by_torch or release else options), **OPTIONS)
    if release:
        enable_gradient_release(model, optimizer, **options)
    limit = options.get("max_norm") if by_torch else None
    parallel, norms = under.tensor_parallel, []
    for step in range(STEPS):
        train(
            model,
            optimizer,
            shape.vocab,
            range(step, step + 1),
            clip=limit,
            tensor_parallel=parallel,
        )
        norms.append(optimizer.grad_norm)
    return {"y": weights(model, optimizer), "v": moments(model, optimizer)}, norms


SHARDINGS = [(None, 1), ("fsdp2", 3), ("fsdp2 HSDP", 4), ("tensor parallel x fsdp2", 4)]


# the last one: most parameters lie whole on one of the ranks
@pytest.mark.parametrize(
    ("layout", "world_size"), [*SHARDINGS, ("ddp", 2), ("fsdp1 FULL_SHARD original", 2)]
)
def test_max_norm_is_clip_grad_norm(layout: str | None, world_size: int) -> None:
    options = {"max_norm": 0.3}
    theirs, none = run_ranks(world_size, clipped, layout, options, False, True)[0]
    ours, norms = run_ranks(world_size, clipped, layout, options, False, False)[0]
    assert none == [None] * STEPS and min(norms) > 0.3  # all steps are clipped
    for what in ("y", "v"):
        error, name = relative_error(ours[what], theirs[what], NOISE)
        assert error <= 1e-5, f"{layout}: {what} of {name} differs by {error:.1e}"


@pytest.mark.parametrize("clip", ["block", "tensor"])
def test_clipping_without_the_whole_is_the_same_everywhere(clip: str) -> None:
    alone, _ = run_ranks(1, clipped, None, {"clip": clip}, False, False)[0]
    unclipped, _ = run_ranks(1, clipped, None, {}, False, False)[0]
    assert relative_error(unclipped["y"], alone["y"])[0] > 1e-4
    flat = [("fsdp1 FULL_SHARD original", 2), ("ddp", 2)]
    flat += [("fsdp1 FULL_SHARD flat", 3)] * (clip == "block")
    for layout, world_size in (*SHARDINGS, ("fsdp2 Shard(1)", 2), *flat):
        release = (layout, world_size) not in flat
        found, _ = run_ranks(world_size, clipped, layout, {"clip": clip}, release, False)[0]
        for what in ("y", "v"):
            error, name = relative_error(found[what], alone[what], NOISE)
            assert error <= 1e-5, f"{layout}: {what} of {name} differs by {error:.1e}"


def test_the_running_norm_is_near_the_exact_one() -> None:
    """The same under every sharding; against clip_grad_norm_ as docs/release.md has it."""
    options = {"clip": "norm", "max_norm": 0.3}
    exact, norms = run_ranks(1, clipped, None, options, False, False)[0]
    alone, seen = run_ranks(1, clipped, None, options, True, False)[0]
    found, _ = run_ranks(2, clipped, "fsdp2", options, True, False)[0]
    units_differ, name = relative_error(found["y"], alone["y"], NOISE)
    assert units_differ <= 0.15, name  # other units, which have seen more or less of the norm
    assert relative_error(alone["y"], exact["y"], NOISE)[0] <= 0.15
    assert all(0.5 < a / b < 2.0 for a, b in zip(seen, norms, strict=True))


@pytest.mark.parametrize("averaging", ["schedule_free", "ema"])
def test_micro_batches_into_the_state(averaging: str) -> None:
    """The same under every sharding; from one batch it differs as docs/release.md says."""
    whole = run_ranks(1, accumulated, None, 1, False, "exact", averaging)[0]
    alone = run_ranks(1, accumulated, None, 4, True, "state", averaging)[0]
    assert 1e-4 < relative_error(alone["y"], whole["y"], NOISE)[0] < 0.25
    # two ranks see the same micro-batches if each takes half of everyone's rows
    found = run_ranks(2, accumulated, "fsdp2", 3, True, "state", averaging)[0]
    again = run_ranks(2, accumulated, "fsdp2 Shard(1)", 3, True, "state", averaging)[0]
    error, name = relative_error(again["y"], found["y"], NOISE)
    assert error <= 1e-5, name


@pytest.mark.parametrize("averaging", ["schedule_free", "ema"])
def test_parts_of_one_gradient_are_that_gradient(averaging: str) -> None:
    """Where the second moment does not count (a large eps), the algebra is exact."""
    options: dict[str, Any] = {**OPTIONS, "averaging": averaging, "blocks": "row"}
    options |= {"eps": 1e14, "lr": 3e12, "weight_decay": 1e-14}
    torch.manual_seed(0)
    whole, parts = nn.Linear(6, 5, dtype=torch.float64), nn.Linear(6, 5, dtype=torch.float64)
    parts.load_state_dict(whole.state_dict())
    ours, theirs = AMSF(parts, **options), AMSF(whole, **options)
    enable_gradient_release(parts, ours, accumulation="state")
    for step in range(20):
        inputs = torch.randn(4, 6, dtype=torch.float64)
        whole(inputs).sum().backward()
        theirs.step()
        theirs.zero_grad()
        for piece in range(4):
            # the first step of a run has no second moment to go by, and takes its last part alone
            row = inputs if not step else inputs[piece : piece + 1]
            ours.optimizer_accumulation = piece < 3
            if step or piece == 3:
                parts(row).sum().backward()
            ours.step()
    for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=0.0)
    with ours.averaged_parameters(), theirs.averaged_parameters():
        for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=0.0)
