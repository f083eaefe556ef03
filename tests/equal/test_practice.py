"""Promise 2 in daily practice: accumulation, frozen layers, missing gradients, equal replicas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import LAYOUTS, OPTIONS, SHAPES, fsdp2, loss_of, relative_error, single, weights
from models import Transformer, batch
from ranks import run_ranks
from torch import nn
from torch.nn import functional as F

from amsf_dist import AMSF

SHAPE, NOISE, STEPS = "uneven", "k_proj.bias", 10
VOCAB = SHAPES[SHAPE].vocab


def micro_losses(model: nn.Module, step: int, rank: int, world_size: int) -> list[Any]:
    """Two micro-batches of this rank's part, each half of the loss."""
    tokens = batch(step, VOCAB, size=12).chunk(world_size)[rank]
    return [
        lambda part=part: (
            F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()) / 2
        )
        for part in tokens.chunk(2)
    ]


def accumulated(how: str) -> Any:
    model = Transformer(SHAPES[SHAPE], dtype=torch.float32)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if how != "single" else (0, 1)
    model = fsdp2(model) if how != "single" else single(model)
    optimizer = AMSF(model, blocks="adam_mini", **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = micro_losses(model, step, rank, world_size)
        for index, loss in enumerate(losses):
            if how == "no sync":
                model.set_requires_gradient_sync(index == len(losses) - 1)
            loss().backward()
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("how", ["sync", "no sync"])
def test_accumulated_gradients_are_those_of_one_process(how: str) -> None:
    expected = accumulated("single")
    for ours in run_ranks(2, accumulated, how):
        error, name = relative_error(ours, expected, NOISE)
        assert error <= 1e-5, f"{name} differs by {error:.1e}"


def frozen(sharded: bool) -> Any:
    model = Transformer(SHAPES[SHAPE], dtype=torch.float32)
    model.model.layers[0].mlp.requires_grad_(False)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    model = fsdp2(model) if sharded else model
    optimizer = AMSF(model, blocks="tensor", **OPTIONS)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, VOCAB, step, rank, world_size).backward()
        optimizer.step()
    values = weights(model)
    assert torch.equal(values["model.layers.0.mlp.up_proj.weight"], before)
    return values, len(optimizer.state)


def test_frozen_layers_stay_and_cost_nothing() -> None:
    expected, states = frozen(False)
    assert states == len(expected) - 3  # gate, up and down projection
    for ours, count in run_ranks(3, frozen, True):
        assert count == states
        error, name = relative_error(ours, expected, NOISE)
        assert error <= 1e-5, f"{name} differs by {error:.1e}"


def missing_on_one_rank() -> Any:
    """Cut blocks, and a gradient that one rank lacks: nobody may wait for it."""
    model = fsdp2(Transformer(SHAPES[SHAPE], dtype=torch.float32))
    optimizer = AMSF(model, blocks="tensor", **OPTIONS)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, VOCAB, step).backward()
        if dist.get_rank() == 1:
            model.model.norm.weight.grad = None
        optimizer.step()
    return [float(state["step"]) for state in optimizer.state.values()]


def test_a_gradient_that_one_rank_lacks_hangs_nobody() -> None:
    assert run_ranks(2, missing_on_one_rank) == [[3.0] * 16] * 2


def unused_everywhere() -> Any:
    model = fsdp2(Transformer(SHAPES[SHAPE], dtype=torch.float32))
    optimizer = AMSF(model, blocks="tensor", averaging="ema", **OPTIONS)
    name = "model.layers.0.mlp.up_proj.weight"
    before = weights(model)[name]
    loss_of(model, VOCAB, 0).backward()
    dict(model.named_parameters())[name].grad = None
    optimizer.step()
    return torch.equal(weights(model)[name], before)


def test_a_parameter_unused_on_all_ranks_stays() -> None:
    assert run_ranks(2, unused_everywhere) == [True, True]


def replicas(poison: bool) -> Any:
    model = LAYOUTS["fsdp2 HSDP"].wrap(Transformer(SHAPES[SHAPE], dtype=torch.float32))
    optimizer = AMSF(model, blocks="adam_mini", **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, VOCAB, step, dist.get_rank(), dist.get_world_size()).backward()
        if poison and step == 3 and dist.get_rank() == 1:
            next(iter(model.parameters())).grad.to_local()[0, 0] = torch.nan
        optimizer.step()
    local = [param.to_local().detach().clone() for param in model.parameters()]
    return local, optimizer.skipped_steps, [float(s["step"]) for s in optimizer.state.values()]


def test_replicas_stay_bit_equal() -> None:
    ranks = run_ranks(4, replicas, False)
    for ours, other in ((0, 2), (1, 3)):  # ranks 0 and 2 hold the same shard
        assert all(torch.equal(a, b) for a, b in zip(ranks[ours][0], ranks[other][0], strict=True))


def test_a_gradient_not_finite_on_one_rank_skips_the_step_on_all() -> None:
    for _, skipped, steps in run_ranks(4, replicas, True):
        assert skipped == 1
        assert set(steps) == {STEPS - 1.0}
