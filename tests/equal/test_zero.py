"""Promise 2 under DeepSpeed: every ZeRO stage is one process without DeepSpeed."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from layouts import OPTIONS, SHAPES, relative_error
from layouts import moments as plain_moments
from layouts import train as train_plain
from layouts import weights as plain_weights
from models import Transformer
from ranks import run_ranks
from zero import CLIP, config, counters, engine_of, everything, train

from amsf_dist import AMSF

STEPS = 10  # twice the warm-up
TOLERANCE = {"y": 1e-5, "x": 1e-5, "v": 1e-6}
NOISE = "k_proj.bias"  # no true gradient, see tests/equal/test_sharding.py
RULES: list[dict[str, Any]] = [
    {"blocks": "auto"},
    {"blocks": "tensor", "clip": "block"},  # blocks over more than two ranks
    {"blocks": "adam_mini", "averaging": "ema"},
    {"blocks": "factored"},
]
ACCUMULATE = {"gradient_accumulation_steps": 2}
CPU = {"device": "cpu"}

SETTINGS: dict[str, dict[str, Any]] = {
    "0": {},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "1 round robin": {"stage": 1, "zero": {"round_robin_gradients": True}},
    "2 round robin": {"stage": 2, "zero": {"round_robin_gradients": True}},
    "2 not contiguous": {"stage": 2, "zero": {"contiguous_gradients": False}},
    "2 accumulated": {"stage": 2, **ACCUMULATE},
    "2 offload": {"stage": 2, "zero": {"offload_optimizer": CPU}},
    "3 sub-groups": {"stage": 3, "zero": {"sub_group_size": 500}},
    "3 sub-groups accumulated": {"stage": 3, "zero": {"sub_group_size": 500}, **ACCUMULATE},
    "3 nothing persistent": {"stage": 3, "zero": {"stage3_param_persistence_threshold": 0}},
    "3 offload": {"stage": 3, "zero": {"offload_optimizer": CPU, "offload_param": CPU}},
}
WIDE = ("1", "2", "3", "2 round robin", "3 sub-groups")


@cache
def one_process(shape: str, rule: int) -> dict[str, Any]:
    model = Transformer(SHAPES[shape], dtype=torch.float32)
    optimizer = AMSF(model, head_dim=head_dim(shape), **RULES[rule], **OPTIONS)
    train_plain(model, optimizer, SHAPES[shape].vocab, range(STEPS), clip=CLIP)
    at_y = plain_weights(model, optimizer)
    with optimizer.averaged_parameters():
        at_x = plain_weights(model, optimizer)
    return {"y": at_y, "x": at_x, "v": plain_moments(model, optimizer)}


def head_dim(shape: str) -> int:
    return SHAPES[shape].head_dim


def under_deepspeed(names: list[str], shape: str, rules: list[int]) -> Any:
    found = {}
    for name in names:
        for rule in rules:
            amsf = {**RULES[rule], "head_dim": head_dim(shape)}
            engine = engine_of(
                Transformer(SHAPES[shape], dtype=torch.float32),
                config(amsf=amsf, **SETTINGS[name]),
            )
            train(engine, SHAPES[shape].vocab, range(STEPS))
            assert counters(engine) == {float(STEPS)}
            found[name, rule] = everything(engine)
            engine.destroy()
    return found


def assert_equal_to_one_process(found: Any, shape: str) -> None:
    for (name, rule), values in found.items():
        for what, value in values.items():
            error, where = relative_error(value, one_process(shape, rule)[what], NOISE)
            assert error <= TOLERANCE[what], f"{name} {RULES[rule]}: {what} of {where}: {error:.1e}"


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks(name: str) -> None:
    rules = [0, 1, 2, 3] if name in WIDE else [1]
    for found in run_ranks(2, under_deepspeed, [name], "uneven", rules):
        assert_equal_to_one_process(found, "uneven")


@pytest.mark.parametrize("world_size", [3, 4])
def test_more_ranks(world_size: int) -> None:
    shape = "even" if world_size == 4 else "uneven"
    for found in run_ranks(world_size, under_deepspeed, list(WIDE), shape, [0, 1, 3]):
        assert_equal_to_one_process(found, shape)
