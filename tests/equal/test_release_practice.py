"""Gradient release in the loops that people write: still the ordinary step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import LAYOUTS, OPTIONS, SHAPES, loss_of, relative_error, train, weights
from models import Transformer, assert_same_bits
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from amsf_dist import AMSF, enable_gradient_release

STEPS, SHAPE = 6, SHAPES["uneven"]
NOISE = "k_proj.bias"  # no true gradient, see tests/equal/test_sharding.py
LOW = {"weight_storage": "bf16+8", "state_storage": "int8"}


def both(function: Any, *args: Any) -> Any:
    return function(*args, True), function(*args, False)


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    error, name = relative_error(found, wanted, NOISE)
    assert error <= 1e-5, f"{name} differs by {error:.1e}"


def built(layout: str | None, release: bool, dtype: torch.dtype = torch.float32, **options: Any):
    model: Any = Transformer(SHAPE, dtype=dtype)
    model = LAYOUTS[layout].wrap(model) if layout else model
    optimizer = AMSF(model, **OPTIONS, **options)
    if release:
        enable_gradient_release(model, optimizer)
    return model, optimizer


def low_bits(release: bool) -> Any:
    """Rounding at random goes by the step, the parameter and the place: not by the unit."""
    model, optimizer = built("fsdp2", release, torch.bfloat16, **LOW)
    train(model, optimizer, SHAPE.vocab, range(STEPS))
    whole = {name: value.float() for name, value in weights(model).items()}
    with optimizer.averaged_parameters():
        return whole, {name: value.float() for name, value in weights(model).items()}


def test_few_bytes_on_two_ranks_bit_for_bit() -> None:
    for found, ordinary in run_ranks(2, both, low_bits):
        assert_same_bits(found[0], ordinary[0])
        assert_same_bits(found[1], ordinary[1])


def unsynchronised(release: bool) -> Any:
    """What pipeline schedules do: FSDP2 reduces with the last micro-batch."""
    model, optimizer = built("fsdp2", release)
    rank, ranks, pieces = dist.get_rank(), dist.get_world_size(), 3
    for step in range(STEPS):
        for piece in range(pieces):
            model.set_requires_gradient_sync(piece == pieces - 1)
            model.set_is_last_backward(piece == pieces - 1)
            part = rank * pieces + piece
            (loss_of(model, SHAPE.vocab, step, part, ranks * pieces) / pieces).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def test_micro_batches_that_are_reduced_at_the_end() -> None:
    found, ordinary = run_ranks(2, both, unsynchronised)[0]
    assert_equal(found, ordinary)


def two_losses(layout: str | None, release: bool) -> Any:
    model, optimizer = built(layout, release)
    rank = dist.get_rank() if layout else 0
    ranks = dist.get_world_size() if layout else 1
    for step in range(STEPS):
        for number, scale in ((0, 0.25), (1, 0.75)):
            if release:
                optimizer.optimizer_accumulation = number == 0
            (scale * loss_of(model, SHAPE.vocab, 2 * step + number, rank, ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize(("layout", "ranks"), [(None, 1), ("fsdp2", 2)])
def test_two_losses_in_one_step(layout: str | None, ranks: int) -> None:
    found, ordinary = run_ranks(ranks, both, two_losses, layout)[0]
    assert_equal(found, ordinary)


class Routed(nn.Module):
    """One of two experts works in a step; the other gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, inputs: torch.Tensor, expert: int) -> torch.Tensor:
        return self.head(torch.tanh(self.experts[expert](torch.tanh(self.stem(inputs)))))


def routed(sharded: bool, release: bool) -> Any:
    model = Routed()
    if sharded:
        for module in (model.stem, *model.experts, model.head):
            fully_shard(module)
        fully_shard(model)
    optimizer = AMSF(model, **OPTIONS)
    if release:
        enable_gradient_release(model, optimizer)
    torch.manual_seed(1)
    for step in range(STEPS):
        model(torch.randn(4, 6), step // 2 % 2).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize(("sharded", "ranks"), [(False, 1), (True, 3)])
def test_modules_that_are_not_used_in_every_step(sharded: bool, ranks: int) -> None:
    for found, ordinary in run_ranks(ranks, both, routed, sharded):
        assert_equal(found, ordinary)


@pytest.mark.parametrize("clip", ["norm", "tensor"])
def test_going_on_from_a_state_dict_that_knows_earlier_norms(clip: str) -> None:
    options = {"clip": clip, **({"max_norm": 0.3} if clip == "norm" else {})}
    model, optimizer = built(None, True, **options)
    train(model, optimizer, SHAPE.vocab, range(STEPS))
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, SHAPE.vocab, range(STEPS, 2 * STEPS))
    again, fresh = built(None, True, **options)
    again.load_state_dict(kept[0])
    fresh.load_state_dict(kept[1])
    train(again, fresh, SHAPE.vocab, range(STEPS, 2 * STEPS))
    assert_same_bits(weights(again), weights(model))


def test_schedulers_set_the_learning_rate_of_the_next_backward() -> None:
    found = []
    for release in (True, False):
        model, optimizer = built(None, release)
        scheduler = LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        for step in range(STEPS):
            train(model, optimizer, SHAPE.vocab, range(step, step + 1))
            scheduler.step()
        found.append(weights(model))
    assert_same_bits(found[0], found[1])
