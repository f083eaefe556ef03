"""Two sets of weights: y, where gradients are taken, and the average x, which is evaluated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import Little, Shape, Transformer, assert_same_bits, backward, everything, fit

from amsf_dist import AMSF

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
AVERAGINGS = pytest.mark.parametrize("averaging", ["schedule_free", "ema"])


def trained(steps: int = 5, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = Little(dtype)
    optimizer = AMSF(model, **{"lr": 0.02, "weight_decay": 0.1, **options})
    fit(model, optimizer, steps)
    return model, optimizer


# Train and eval ---------------------------------------------------------------------------------


@AVERAGINGS
def test_a_new_optimizer_is_in_train_mode_and_all_points_are_one(averaging: str) -> None:
    model, optimizer = trained(0, averaging=averaging)
    before = copy.deepcopy(model)
    assert all(group["train_mode"] for group in optimizer.param_groups)
    optimizer.train()
    assert_same_bits(model, before)
    optimizer.eval()
    assert_same_bits(model, before)
    assert_same_bits(optimizer.averaged_state_dict(model), dict(before.state_dict()))


@DTYPES
@AVERAGINGS
@pytest.mark.parametrize("state_storage", ["fp32", "bf16"])
def test_eval_then_train_changes_nothing(
    dtype: torch.dtype, averaging: str, state_storage: str
) -> None:
    model, optimizer = trained(dtype=dtype, averaging=averaging, state_storage=state_storage)
    before = everything(model, optimizer)
    for _ in range(50):
        optimizer.eval()
        optimizer.train()
    assert_same_bits(everything(model, optimizer), before)


@DTYPES
def test_looking_at_the_average_on_the_way_does_not_change_the_way(dtype: torch.dtype) -> None:
    model, optimizer = trained(0, dtype)
    theirs, plain = trained(0, dtype)
    for step in range(12):
        fit(model, optimizer, [step])
        optimizer.eval()
        if step % 3 == 0:
            optimizer.eval()  # idempotent
            with torch.no_grad():
                model.loss(step)
        optimizer.train()
        if step % 4 == 0:
            optimizer.train()
    fit(theirs, plain, 12)
    assert_same_bits(everything(model, optimizer), everything(theirs, plain))


def test_the_average_is_not_the_training_weights() -> None:
    model, optimizer = trained()
    before = copy.deepcopy(model)
    optimizer.eval()
    for mine, other in zip(model.parameters(), before.parameters(), strict=True):
        assert (mine != other).any()


def test_under_ema_both_modes_hold_the_same_weights() -> None:
    model, optimizer = trained(averaging="ema")
    before = copy.deepcopy(model)
    optimizer.eval()
    assert_same_bits(model, before)


def test_parameters_stay_the_same_objects_in_both_modes() -> None:
    model, optimizer = trained()
    addresses = [(id(param), param.data_ptr()) for param in model.parameters()]
    optimizer.eval()
    optimizer.train()
    assert addresses == [(id(param), param.data_ptr()) for param in model.parameters()]


def test_eval_keeps_gradients_and_versions_usable() -> None:
    model, optimizer = trained()
    backward(model, 5)
    gradients = [param.grad.clone() for param in model.parameters()]
    optimizer.eval()
    optimizer.train()
    assert_same_bits([param.grad for param in model.parameters()], gradients)
    optimizer.step()


@AVERAGINGS
@pytest.mark.parametrize("gradients", [True, False])
def test_stepping_in_eval_mode_raises_names_the_cure_and_changes_nothing(
    averaging: str, gradients: bool
) -> None:
    """Also without gradients: they may lie on other ranks, which must not wait for this one."""
    model, optimizer = trained(averaging=averaging)
    nothing = torch.nn.Parameter(torch.zeros(0, 4))  # as a rank without a share of it sees it
    optimizer.add_param_group({"params": [("nothing", nothing)]})
    optimizer.eval()
    backward(model, 5)
    if not gradients:
        optimizer.zero_grad()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        optimizer.step()
    assert_same_bits(everything(model, optimizer), before)
    assert optimizer.skipped_steps == 0
    optimizer.train()
    fit(model, optimizer, 1)


def test_a_parameter_unfrozen_in_eval_mode_survives_the_return() -> None:
    model = Little()
    model.norm.requires_grad_(False)
    optimizer = AMSF(model.named_parameters(), lr=0.02)
    fit(model, optimizer, 3)
    before = copy.deepcopy(model)
    optimizer.eval()
    model.norm.requires_grad_(True)
    optimizer.train()
    assert_same_bits(model, before)
    fit(model, optimizer, 2)


# averaged_parameters ----------------------------------------------------------------------------


def test_averaged_parameters_hold_the_average_inside_only() -> None:
    model, optimizer = trained()
    before = everything(model, optimizer)
    average = optimizer.averaged_state_dict(model)
    with optimizer.averaged_parameters():
        assert_same_bits(dict(model.state_dict()), average)
    assert_same_bits(everything(model, optimizer), before)


def test_averaged_parameters_nest() -> None:
    model, optimizer = trained()
    before = everything(model, optimizer)
    average = optimizer.averaged_state_dict(model)
    with optimizer.averaged_parameters():
        with optimizer.averaged_parameters():
            assert_same_bits(dict(model.state_dict()), average)
        assert_same_bits(dict(model.state_dict()), average)
    assert_same_bits(everything(model, optimizer), before)


def test_averaged_parameters_come_back_after_an_exception() -> None:
    model, optimizer = trained()
    before = everything(model, optimizer)
    with pytest.raises(KeyError), optimizer.averaged_parameters():
        raise KeyError("the evaluation failed")
    assert_same_bits(everything(model, optimizer), before)


def test_averaged_parameters_leave_eval_mode_as_they_found_it() -> None:
    model, optimizer = trained()
    optimizer.eval()
    before = everything(model, optimizer)
    with optimizer.averaged_parameters():
        pass
    assert_same_bits(everything(model, optimizer), before)


def test_train_inside_averaged_parameters_is_obeyed() -> None:
    model, optimizer = trained()
    before = everything(model, optimizer)
    with optimizer.averaged_parameters():
        optimizer.train()
        assert_same_bits(everything(model, optimizer), before)
    assert_same_bits(everything(model, optimizer), before)


# averaged_state_dict ----------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_averaged_state_dict_is_what_eval_shows(dtype: torch.dtype, mode: str) -> None:
    model, optimizer = trained(dtype=dtype)
    getattr(optimizer, mode)()
    before = everything(model, optimizer)
    average = optimizer.averaged_state_dict(model)
    assert_same_bits(everything(model, optimizer), before)
    optimizer.eval()
    assert_same_bits(average, dict(model.state_dict()))


def test_the_averaged_state_dict_loads_strictly_with_buffers_and_tied_names() -> None:
    model = Transformer(Shape(), dtype=torch.float32)
    optimizer = AMSF(model, lr=5e-3)
    fit(model, optimizer, 5)
    average = optimizer.averaged_state_dict(model)
    assert average.keys() == model.state_dict().keys()
    assert_same_bits(average["lm_head.weight"], average["model.embed_tokens.weight"])
    assert_same_bits(average["temperature"], model.temperature)
    again = Transformer(Shape(), dtype=torch.float32, seed=1)
    again.load_state_dict(average)
    with optimizer.averaged_parameters():
        assert_same_bits(again, model)


def test_the_averaged_state_dict_shares_no_memory_with_trained_weights() -> None:
    model, optimizer = trained()
    average = optimizer.averaged_state_dict(model)
    frozen = copy.deepcopy(average)
    fit(model, optimizer, 2)
    assert_same_bits(average, frozen)


def test_frozen_parameters_stand_in_the_averaged_state_dict_as_they_are() -> None:
    model = Little()
    model.norm.requires_grad_(False)
    optimizer = AMSF(model, lr=0.02)
    fit(model, optimizer, 3)
    average = optimizer.averaged_state_dict(model)
    assert_same_bits(average["norm.weight"], model.norm.weight.detach())
    assert not any(value.requires_grad for value in average.values())


def test_names_in_the_averaged_state_dict_are_those_of_the_bare_model() -> None:
    model = Little()
    optimizer = AMSF(model, lr=0.02)
    fit(model, optimizer, 3)
    wrapped = torch.nn.Module()
    wrapped.module = model
    assert optimizer.averaged_state_dict(wrapped).keys() == model.state_dict().keys()
