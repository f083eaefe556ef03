"""Promise 2: any sharding is one process. The layouts are in tests/layouts.py, a line each."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, relative_error, run
from ranks import run_ranks

CLIP = 0.5  # the global norm, so that it also must be the same under every sharding
RULES = [
    ("auto", "schedule_free"),
    ("tensor", "schedule_free"),
    ("adam_mini", "ema"),
    ("element", "schedule_free"),
]
TOLERANCE = {"y": 1e-5, "x": 1e-5, "v": 1e-6}
# Under softmax a key's bias has no true gradient: what arrives is rounding noise, which a division
# by its own size blows up to full steps.
NOISE = "k_proj.bias"

TABLE = [
    (layout, world_size, shape)
    for layout, settings in LAYOUTS.items()
    for world_size in settings.world_sizes
    for shape in settings.shapes
]


@cache
def one_process(shape: str) -> Any:
    return run(None, shape, torch.float32, RULES, CLIP)


@pytest.mark.parametrize(("layout", "world_size", "shape"), TABLE)
def test_any_sharding_is_one_process(layout: str, world_size: int, shape: str) -> None:
    for ours in run_ranks(world_size, run, layout, shape, torch.float32, RULES, CLIP):
        for rule, (values, (collectives, _)) in ours.items():
            assert collectives <= 2
            for what, value in values.items():
                error, name = relative_error(value, one_process(shape)[rule][0][what], NOISE)
                assert error <= TOLERANCE[what], f"{rule}: {what} of {name} differs by {error:.1e}"
