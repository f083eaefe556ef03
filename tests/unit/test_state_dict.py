"""What is saved comes back: complete, in our dtypes, by name, or with an error and no change."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Little, assert_same_bits, backward, everything, fit
from torch import nn

from amsf_dist import AMSF

AVERAGINGS = pytest.mark.parametrize("averaging", ["schedule_free", "ema"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
LR = 0.02


def trained(steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = Little(dtype)
    optimizer = AMSF(model, **{"lr": LR, "weight_decay": 0.1, **options})
    fit(model, optimizer, steps)
    return model, optimizer


def through_a_file(value: Any) -> Any:
    memory = io.BytesIO()
    torch.save(value, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=True)


# Completeness -----------------------------------------------------------------------------------


@AVERAGINGS
@pytest.mark.parametrize("blocks", ["auto", "adam_mini", "row", "tensor", "element"])
@pytest.mark.parametrize("state_storage", ["fp32", "bf16"])
def test_state_is_complete_before_the_first_step(
    averaging: str, blocks: str, state_storage: str
) -> None:
    model, optimizer = trained(0, averaging=averaging, blocks=blocks, state_storage=state_storage)
    before = copy.deepcopy(optimizer.state_dict())
    fit(model, optimizer, 2)
    after = optimizer.state_dict()
    assert len(before["state"]) == len(list(model.parameters()))
    assert before["state"].keys() == after["state"].keys()
    for key, entries in before["state"].items():
        assert list(entries) == list(after["state"][key])
        assert all(not value.any() for value in entries.values())
        for name, value in entries.items():
            assert value.shape == after["state"][key][name].shape
            assert value.dtype == after["state"][key][name].dtype


def test_the_state_has_torch_s_own_names() -> None:
    _, optimizer = trained(0, averaging="ema")
    assert set(optimizer.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    _, optimizer = trained(0)
    assert {"step", "gap", "exp_avg_sq"} <= set(optimizer.state_dict()["state"][0])


def test_a_frozen_parameter_costs_no_state_until_it_is_unfrozen() -> None:
    model = Little()
    model.norm.requires_grad_(False)
    optimizer = AMSF(model.named_parameters(), lr=LR)
    assert sum("gap" in entries for entries in optimizer.state_dict()["state"].values()) == 3
    model.norm.requires_grad_(True)
    fit(model, optimizer, 1)
    assert sum("gap" in entries for entries in optimizer.state_dict()["state"].values()) == 5


# Round trips ------------------------------------------------------------------------------------


@AVERAGINGS
@DTYPES
@pytest.mark.parametrize("blocks", ["auto", "adam_mini", "element"])
def test_resumed_is_uninterrupted(averaging: str, dtype: torch.dtype, blocks: str) -> None:
    options = {"averaging": averaging, "blocks": blocks, "warmup_steps": 5, "r": 1.0}
    model, optimizer = trained(4, dtype, **options)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    fit(model, optimizer, range(4, 8))

    again, resumed = trained(2, dtype, averaging=averaging, blocks=blocks)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    fit(again, resumed, range(4, 8))
    assert_same_bits(everything(again, resumed), everything(model, optimizer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_storage", ["fp32", "bf16"])
def test_state_keeps_its_dtype_beside_low_precision_weights(
    dtype: torch.dtype, state_storage: str
) -> None:
    _, optimizer = trained(3, dtype, state_storage=state_storage)
    saved = through_a_file(optimizer.state_dict())
    _, fresh = trained(0, dtype, state_storage=state_storage)
    fresh.load_state_dict(saved)
    line = torch.bfloat16 if state_storage == "bf16" else torch.float32
    for entries in fresh.state.values():
        assert entries["gap"].dtype == line
        assert entries["exp_avg_sq"].dtype == torch.float32
        assert entries["step"].dtype == torch.float64
    assert_same_bits(fresh.state_dict(), saved)


def test_hyper_parameters_come_with_the_state() -> None:
    _, optimizer = trained(3, betas=(0.8, 0.9), r=2.0, weight_decay=0.5)
    optimizer.param_groups[0]["lr"] = 0.125
    _, fresh = trained(0, lr=1.0)
    fresh.load_state_dict(optimizer.state_dict())
    group = fresh.param_groups[0]
    values = (group["lr"], group["betas"], group["r"], group["weight_decay"])
    assert values == (0.125, (0.8, 0.9), 2.0, 0.5)


def test_what_a_scheduler_left_in_the_group_comes_with_the_state() -> None:
    _, optimizer = trained(0)
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    _, fresh = trained(0)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["initial_lr"] == LR


def test_a_loaded_state_is_a_copy() -> None:
    _, optimizer = trained(3)
    saved = copy.deepcopy(optimizer.state_dict())
    untouched = copy.deepcopy(saved)
    model, fresh = trained(0)
    fresh.load_state_dict(saved)
    fit(model, fresh, 2)
    fresh.eval()
    fresh.param_groups[0]["lr"] = 7.0
    assert_same_bits(saved, untouched)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_loading_one_s_own_state_dict_changes_nothing(mode: str) -> None:
    model, optimizer = trained(3)
    trained_weights = copy.deepcopy(model)
    getattr(optimizer, mode)()
    before = everything(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same_bits(everything(model, optimizer), before)
    optimizer.train()
    assert_same_bits(model, trained_weights)


@DTYPES
def test_a_state_dict_saved_in_eval_mode_restores_the_training_weights(dtype: torch.dtype) -> None:
    model, optimizer = trained(4, dtype)
    at_y = everything(model, optimizer)
    optimizer.eval()
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    again, resumed = trained(1, dtype)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert_same_bits(again, model)  # x
    resumed.train()
    assert_same_bits(everything(again, resumed), at_y)


def test_a_state_dict_saved_in_train_mode_ends_eval_mode() -> None:
    model, optimizer = trained(4)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    fit(model, optimizer, range(4, 8))
    again, resumed = trained(2)
    resumed.eval()
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    fit(again, resumed, range(4, 8))
    assert_same_bits(everything(again, resumed), everything(model, optimizer))


def test_an_eval_state_dict_without_the_training_weights_restores_them_to_rounding() -> None:
    """Some loaders keep only the keys that they know."""
    model, optimizer = trained(4)
    before = copy.deepcopy(model)
    known = set(optimizer.state_dict()["state"][0])
    optimizer.eval()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] = {
        key: {name: value for name, value in entries.items() if name in known}
        for key, entries in saved["state"].items()
    }
    again, resumed = trained(0)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    resumed.train()
    for mine, other in zip(again.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_a_state_dict_of_torch_s_adamw_goes_on_as_adamw() -> None:
    model, theirs = Little(torch.float64), Little(torch.float64)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    fit(theirs, adamw, 3)
    optimizer = AMSF(model, averaging="ema", blocks="element")
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    model.load_state_dict(theirs.state_dict())
    fit(model, optimizer, range(3, 6))
    fit(theirs, adamw, range(3, 6))
    for mine, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


# Names ------------------------------------------------------------------------------------------


def by_name(optimizer: AMSF) -> dict[str, Any]:
    saved = optimizer.state_dict()
    return {
        name: saved["state"][key]
        for group in saved["param_groups"]
        for name, key in zip(group["param_names"], group["params"], strict=True)
    }


def test_parameters_in_another_order_are_matched_by_name() -> None:
    model, optimizer = trained(4)
    again = Little()
    backwards = AMSF(reversed(list(again.named_parameters())), lr=LR, weight_decay=0.1)
    backwards.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_bits(by_name(backwards), by_name(optimizer))
    again.load_state_dict(model.state_dict())
    fit(model, optimizer, range(4, 7))
    fit(again, backwards, range(4, 7))
    assert_same_bits(again, model)
    assert_same_bits(by_name(backwards), by_name(optimizer))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", ""])
def test_what_wrappers_add_to_a_name_does_not_matter(prefix: str) -> None:
    model = Little()
    wrapped = AMSF([(prefix + name, param) for name, param in model.named_parameters()], lr=LR)
    fit(model, wrapped, 3)
    _, bare = trained(0)
    bare.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    assert_same_bits(list(by_name(bare).values()), list(by_name(wrapped).values()))


def test_without_names_parameters_are_matched_by_order() -> None:
    model, optimizer = trained(3, blocks="row")
    saved = copy.deepcopy(optimizer.state_dict())
    unnamed = AMSF(Little().parameters(), blocks="row")
    unnamed.load_state_dict(saved)
    assert_same_bits(unnamed.state_dict()["state"], saved["state"])
    optimizer.load_state_dict(copy.deepcopy(unnamed.state_dict()))
    assert_same_bits(optimizer.state_dict()["state"], saved["state"])
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]


# Refusals ---------------------------------------------------------------------------------------


def other_groups(saved: dict[str, Any]) -> None:
    saved["param_groups"].append(saved["param_groups"][0])


def fewer_parameters(saved: dict[str, Any]) -> None:
    for key in ("params", "param_names"):
        saved["param_groups"][0][key] = saved["param_groups"][0][key][:-1]


def another_name(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["param_names"][-1] = "down_proj.bias"


def another_shape(saved: dict[str, Any]) -> None:
    saved["state"][4]["gap"] = torch.zeros(11)


def other_blocks(saved: dict[str, Any]) -> None:
    saved["state"][3]["exp_avg_sq"] = torch.zeros(5)


def elements_that_differ_in_a_block(saved: dict[str, Any]) -> None:
    saved["state"][3]["exp_avg_sq"] = torch.arange(60.0).view(10, 6)


def missing_line(saved: dict[str, Any]) -> None:
    del saved["state"][4]["gap"]


def other_averaging(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["averaging"] = "ema"


def impossible_value(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["betas"] = (0.9, 2.0)


def state_of_schedulefree(saved: dict[str, Any]) -> None:
    for entries in saved["state"].values():
        entries["z"] = entries.pop("gap")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (other_groups, ["2 parameter groups", "this optimizer 1"]),
        (fewer_parameters, ["group 0", "4 parameters", "this optimizer 5"]),
        (another_name, ["'up_proj.bias'", "'down_proj.bias'"]),
        (another_shape, ["up_proj.bias", "'gap'", "(11,)", "(10,)"]),
        (other_blocks, ["up_proj.weight", "'exp_avg_sq'", "(5,)", "(10,)", "blocks="]),
        (elements_that_differ_in_a_block, ["up_proj.weight", "per element", "inside a block"]),
        (missing_line, ["up_proj.bias", "no 'gap'", "exp_avg_sq"]),
        (other_averaging, ["group 0", "'ema'", "'schedule_free'"]),
        (impossible_value, ["beta2", "[0, 1)", "2.0"]),
        (state_of_schedulefree, ["no 'gap'", "'z'"]),
    ],
)
def test_a_state_dict_of_something_else_is_refused_and_changes_nothing(
    spoil: Callable[[dict[str, Any]], None], says: list[str]
) -> None:
    _, source = trained(3)
    saved = copy.deepcopy(source.state_dict())
    spoil(saved)
    model, optimizer = trained(2)
    before = everything(model, optimizer)
    with pytest.raises(ValueError) as raised:
        optimizer.load_state_dict(saved)
    for part in says:
        assert part in str(raised.value)
    assert_same_bits(everything(model, optimizer), before)
    fit(model, optimizer, [5])


def test_a_parameter_without_saved_state_starts_anew_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, source = trained(3)
    saved = copy.deepcopy(source.state_dict())
    del saved["state"][0]
    model, optimizer = trained(2)
    with caplog.at_level(logging.WARNING):
        optimizer.load_state_dict(saved)
    assert "embed_tokens.weight" in caplog.text
    entries = optimizer.state[model.embed_tokens.weight]
    assert all(not value.any() for value in entries.values())
    fit(model, optimizer, 1)


def test_a_parameter_without_saved_state_keeps_its_weights_in_eval_mode() -> None:
    _, source = trained(3)
    source.eval()
    saved = copy.deepcopy(source.state_dict())
    del saved["state"][0]
    model, optimizer = trained(2)
    optimizer.eval()
    average = model.embed_tokens.weight.detach().clone()
    optimizer.load_state_dict(saved)
    optimizer.train()
    assert_same_bits(model.embed_tokens.weight.detach(), average)


def test_parameters_replaced_after_training_are_named() -> None:
    """model.load_state_dict(assign=True), or a wrapper, put new parameters into the groups."""
    model, optimizer = trained(2)
    fresh = nn.Parameter(model.norm.weight.detach().clone())
    optimizer.param_groups[0]["params"][1] = fresh
    with pytest.raises(RuntimeError, match="no longer in the"):
        optimizer.step()


@pytest.mark.parametrize("state_mode", ["train", "eval"])
def test_model_and_optimizer_files_of_different_modes_are_refused(state_mode: str) -> None:
    model, optimizer = trained(4)
    saved: dict[str, Any] = {}
    for mode in ("eval", "train"):
        getattr(optimizer, mode)()
        saved[mode] = through_a_file([model.state_dict(), optimizer.state_dict()])
    other = "eval" if state_mode == "train" else "train"
    fresh = Little(seed=5)
    resumed = AMSF(fresh, lr=0.02)
    fresh.load_state_dict(saved[other][0])
    resumed.load_state_dict(saved[state_mode][1])
    with pytest.raises(RuntimeError, match="files of different modes.*saved together"):
        backward(fresh, 0)
        resumed.zero_grad() if state_mode == "eval" else None
        resumed.train() if state_mode == "eval" else resumed.step()

    # the same two files of one mode, loaded in either order, are taken
    resumed = AMSF(fresh, lr=0.02)
    resumed.load_state_dict(saved[state_mode][1])
    fresh.load_state_dict(saved[state_mode][0])
    resumed.train()
    assert_same_bits(fresh, model)
    fit(fresh, resumed, 1)
