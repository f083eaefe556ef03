"""Gradients that must not move anything: not finite, sparse, complex."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Little, assert_same_bits, backward, everything, fit
from torch import nn

from amsf_dist import AMSF

AVERAGINGS = pytest.mark.parametrize("averaging", ["schedule_free", "ema"])
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


def spoiled(model: Little, name: str, value: float) -> Callable[[int], None]:
    def before_step(step: int) -> None:
        model.get_parameter(name).grad.view(-1)[-1] = value

    return before_step


@AVERAGINGS
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("blocks", ["auto", "adam_mini", "tensor", "element", "factored"])
@pytest.mark.parametrize("name", ["embed_tokens.weight", "norm.bias", "up_proj.weight"])
def test_a_step_that_is_not_finite_changes_nothing(
    averaging: str, value: float, blocks: str, name: str
) -> None:
    model = Little()
    optimizer = AMSF(model, lr=0.02, averaging=averaging, blocks=blocks, weight_decay=0.1)
    fit(model, optimizer, 3)
    before = everything(model, optimizer)
    fit(model, optimizer, [3], before_step=spoiled(model, name, value))
    assert_same_bits(everything(model, optimizer), before)
    assert optimizer.skipped_steps == 1


@AVERAGINGS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [[0], [2, 3], [0, 1, 4]], ids=str)
def test_the_run_goes_on_as_if_the_bad_steps_had_not_been(
    averaging: str, dtype: torch.dtype, bad: list[int]
) -> None:
    options = {"lr": 0.02, "averaging": averaging, "warmup_steps": 3, "r": 1.0}
    model, theirs = Little(dtype), Little(dtype)
    ours, plain = AMSF(model, **options), AMSF(theirs, **options)
    spoil = spoiled(model, "up_proj.bias", float("nan"))
    for step in range(6):
        fit(model, ours, [step], before_step=spoil if step in bad else None)
        if step not in bad:
            fit(theirs, plain, [step])
    assert_same_bits(everything(model, ours), everything(theirs, plain))
    assert ours.skipped_steps == len(bad)
    assert plain.skipped_steps == 0


def test_one_bad_group_holds_all_groups_back() -> None:
    model = Little()
    named = list(model.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:], "averaging": "ema"}]
    optimizer = AMSF(groups, lr=0.02)
    fit(model, optimizer, 2)
    before = everything(model, optimizer)
    fit(model, optimizer, [2], before_step=spoiled(model, named[-1][0], float("inf")))
    assert_same_bits(everything(model, optimizer), before)


def test_one_bad_dtype_holds_all_dtypes_back() -> None:
    model = Little()
    model.up_proj.double()
    model.forward = lambda tokens: model.up_proj(model.norm(model.embed_tokens(tokens)).double())
    optimizer = AMSF(model, lr=0.02)
    fit(model, optimizer, 2)
    before = everything(model, optimizer)
    for name in ("norm.weight", "up_proj.weight"):
        fit(model, optimizer, [2], before_step=spoiled(model, name, float("nan")))
        assert_same_bits(everything(model, optimizer), before)
    assert optimizer.skipped_steps == 2


@pytest.mark.parametrize("blocks", ["auto", "element", "factored"])
def test_a_gradient_whose_square_overflows_is_skipped_too(blocks: str) -> None:
    """Its second moment would be infinite, and stay so for ever."""
    model = Little()
    optimizer = AMSF(model, blocks=blocks)
    fit(model, optimizer, 2)
    before = everything(model, optimizer)
    fit(model, optimizer, [2], before_step=spoiled(model, "up_proj.weight", 1e30))
    assert_same_bits(everything(model, optimizer), before)
    assert optimizer.skipped_steps == 1


def test_the_largest_half_precision_gradient_is_an_ordinary_one() -> None:
    model = Little(torch.float16)
    optimizer = AMSF(model, lr=1e-3)
    fit(model, optimizer, [0], before_step=spoiled(model, "up_proj.weight", 65504.0))
    assert optimizer.skipped_steps == 0
    assert all(bool(param.isfinite().all()) for param in model.parameters())


def test_weights_that_are_not_finite_are_not_the_optimizer_s_business() -> None:
    """Only gradients are looked at; a frozen embedding of infinities is nobody's mistake."""
    model = Little()
    optimizer = AMSF(model, lr=0.02)
    backward(model, 0)
    with torch.no_grad():
        model.embed_tokens.weight[0, 0] = float("inf")
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert model.embed_tokens.weight.isfinite().sum() == model.embed_tokens.weight.numel() - 1


# Sparse and complex -----------------------------------------------------------------------------


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.embed_tokens = nn.Embedding(8, 4, sparse=True)

    def loss(self, step: int) -> torch.Tensor:
        return self.first(self.embed_tokens(torch.tensor([step % 8, 3]))).square().sum()


def test_sparse_gradients_are_refused_by_name_and_change_nothing() -> None:
    torch.manual_seed(0)
    model = Sparse()
    optimizer = AMSF(model, lr=0.02)
    before = everything(model, optimizer)
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"embed_tokens\.weight.*sparse=False"):
        optimizer.step()
    assert_same_bits(everything(model, optimizer), before)
    model.embed_tokens.sparse = False
    fit(model, optimizer, 2)


def complex_parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(3, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (lambda: [("phase", complex_parameter())], "phase"),
        (lambda: [complex_parameter()], "a parameter"),
        (lambda: [("fine", nn.Parameter(torch.ones(3))), ("phase", complex_parameter())], "phase"),
    ],
)
def test_complex_parameters_are_refused_by_name(params: Any, says: str) -> None:
    with pytest.raises(TypeError, match=f"{says}.*complex"):
        AMSF(params())


def test_a_copy_does_not_share_the_count_of_skipped_steps() -> None:
    model = Little()
    optimizer = AMSF(model)
    twin, its = copy.deepcopy((model, optimizer))
    fit(model, optimizer, [0], before_step=spoiled(model, "norm.bias", float("nan")))
    assert optimizer.skipped_steps == 1
    assert its.skipped_steps == 0
    fit(twin, its, 1)
