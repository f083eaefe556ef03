"""Promise 2: any sharding is one process. The layouts are in tests/layouts.py, a line each."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from beside import beside_one_process
from layouts import LAYOUTS, relative_error, run
from ranks import run_ranks

STEPS = 10  # the warm-up, and as many again; docs/parity.md has longer runs
CLIP = 0.5  # the global norm, so that it also must be the same under every sharding
RULES = {
    torch.float32: [
        ("auto", "schedule_free"),
        ("tensor", "schedule_free"),
        ("adam_mini", "ema"),
        ("element", "schedule_free"),
        ("factored", "schedule_free"),
    ],
    torch.float64: [("auto", "schedule_free"), ("tensor", "ema")],
}
# Gradients differ by the order of summation, some units of the last place, and the steps carry
# that on without blowing it up: 1e-7 becomes 2e-7 in fp32, 1e-16 becomes 1e-15 in fp64.
TOLERANCE = {
    torch.float32: {"y": 1e-5, "x": 1e-5, "v": 1e-6},
    torch.float64: {"y": 1e-12, "x": 1e-12, "v": 1e-12},
}
# Under softmax a key's bias has no true gradient: what arrives is rounding noise, which a division
# by its own size blows up to full steps.
NOISE = "k_proj.bias"
# In fp64 the noise, 1e-18, is far below eps = 1e-8, and a step is lr times their ratio.
NOISE_STEPS = 1e-10

# The third: whether block sums are deterministic, so that not a bit may differ.
BF16_RULES = [("adam_mini", "schedule_free", False), ("tensor", "ema", True)]

TABLE = [
    (layout, world_size, shape)
    for layout, settings in LAYOUTS.items()
    for world_size in settings.world_sizes
    for shape in settings.shapes
]


@cache
def one_process(shape: str, dtype: torch.dtype) -> Any:
    return run(None, shape, dtype, RULES[dtype], CLIP, STEPS)


def in_every_dtype(layout: str, shape: str) -> Any:
    """All in one process group: its start costs more than the training."""
    once = shape == LAYOUTS[layout].shapes[-1]  # other dtypes in one of the shapes
    rules = RULES if once else {torch.float32: RULES[torch.float32]}
    full = {dtype: run(layout, shape, dtype, some, CLIP, STEPS) for dtype, some in rules.items()}
    return full, beside_one_process(layout, shape, torch.bfloat16, BF16_RULES if once else [])


@pytest.mark.parametrize(("layout", "world_size", "shape"), TABLE)
def test_any_sharding_is_one_process(layout: str, world_size: int, shape: str) -> None:
    for full, bf16 in run_ranks(world_size, in_every_dtype, layout, shape):
        for dtype, ours in full.items():
            assert_one_process(dtype, ours, one_process(shape, dtype))
        for (_, _, deterministic), values in bf16.items():
            assert_same_rounding(values, deterministic)


def assert_one_process(dtype: torch.dtype, ours: Any, expected: Any) -> None:
    for rule, (values, (collectives, _)) in ours.items():
        assert collectives <= 2
        for what, value in values.items():
            assert all(tensor.dtype == dtype for tensor in value.values())
            theirs = expected[rule][0][what]
            error, name = relative_error(value, theirs, NOISE)
            told = f"{dtype} {rule}: {what} of {name} differs by {error:.1e}"
            assert error <= TOLERANCE[dtype][what], told
            if dtype == torch.float64 and what != "v":
                error, name = relative_error(value, theirs)
                assert error <= NOISE_STEPS, f"{rule}: {what} of {name} differs by {error:.1e}"


def assert_same_rounding(values: Any, deterministic: bool) -> None:
    """What shards and one process make of the same bf16 gradients.

    State is fp32, and so is the arithmetic: block moments differ by the order of summation alone.
    Results that are 1e-6 of a step apart are rounded to the same bf16 number unless a boundary lies
    between them, which happens to one number in 1e5 at these sizes; then they are neighbours.
    """
    error, name = relative_error(*values["v"])
    assert error <= (0.0 if deterministic else 1e-6), f"v of {name} differs by {error:.1e}"
    for what in ("y", "x"):
        different = total = 0
        for name, value in values[what][0].items():
            theirs = values[what][1][name]
            assert value.dtype == theirs.dtype == torch.bfloat16
            different += int((value != theirs).sum())
            total += value.numel()
            apart = (value.double() - theirs.double()).abs().max()
            assert apart <= 2.0**-7 * theirs.double().abs().max(), f"{what} of {name}"
        allowed = 0.0 if deterministic else 1e-3 * total
        assert different <= allowed, f"{what}: {different} of {total} numbers differ"
