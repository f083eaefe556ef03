"""`deterministic=True`: the same bits of every block moment on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import LAYOUTS, SHAPES, moments, relative_error
from models import Transformer
from ranks import run_ranks
from torch.distributed.tensor import DTensor, distribute_tensor

from amsf_dist import AMSF

SHAPE = "uneven"


def given_gradients(layout: str | None, deterministic: bool) -> Any:
    """Moments after three steps with gradients that do not depend on the number of ranks."""
    model = Transformer(SHAPES[SHAPE], dtype=torch.float32)
    model = LAYOUTS[layout].wrap(model) if layout else model
    optimizer = AMSF(model, blocks="tensor", deterministic=deterministic, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator)
            grad *= torch.logspace(-6, 6, grad.numel()).view(grad.shape)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        optimizer.step()
    return moments(model, optimizer)


@pytest.mark.parametrize(
    ("layout", "world_size"), [("fsdp2", 2), ("fsdp2", 3), ("fsdp2", 4), ("fsdp2 HSDP", 4)]
)
def test_block_moments_have_the_same_bits_on_any_number_of_ranks(
    layout: str, world_size: int
) -> None:
    expected = given_gradients(None, True)
    for ours in run_ranks(world_size, given_gradients, layout, True):
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_exact_sums_are_the_ordinary_ones_up_to_rounding() -> None:
    error, name = relative_error(given_gradients(None, True), given_gradients(None, False))
    assert error <= 1e-6, name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(bad: float) -> None:
    model = Transformer(SHAPES[SHAPE], dtype=torch.float32)
    optimizer = AMSF(model, deterministic=True)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    model.model.norm.weight.grad[3] = bad
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
