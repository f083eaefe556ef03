"""Evaluation under a wrapper is at x, and the training forward after it at y again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import LAYOUTS, SHAPES, loss_of, train
from models import Transformer
from ranks import run_ranks

from amsf_dist import AMSF

SHAPE = "uneven"
VOCAB = SHAPES[SHAPE].vocab


def losses(layout: str | None) -> Any:
    model = Transformer(SHAPES[SHAPE], dtype=torch.float32)
    model = LAYOUTS[layout].wrap(model) if layout else model
    optimizer = AMSF(model, lr=2e-2)
    train(model, optimizer, VOCAB, range(8))
    optimizer.zero_grad()
    seen = []
    for _ in range(2):
        with torch.no_grad():
            seen.append(float(loss_of(model, VOCAB, 100)))  # a forward at y, with no backward
        with optimizer.averaged_parameters(), torch.no_grad():
            seen.append(float(loss_of(model, VOCAB, 100)))
    return seen


@pytest.mark.parametrize(
    "layout",
    ["ddp", "fsdp2", "fsdp2 HSDP", "fsdp1 FULL_SHARD original", "fsdp1 FULL_SHARD flat"],
)
def test_every_forward_sees_the_weights_of_its_mode(layout: str) -> None:
    expected = losses(None)
    assert abs(expected[0] - expected[1]) > 1e-2  # the modes can be told apart
    for ours in run_ranks(4 if "HSDP" in layout else 2, losses, layout):
        assert ours == pytest.approx(expected, abs=1e-4)
