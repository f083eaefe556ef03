"""AMSF is a torch.optim.Optimizer: what works with torch's own works with it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Little, assert_same_bits, backward, everything, fit
from torch import nn
from torch.optim import lr_scheduler

from amsf_dist import AMSF

AVERAGINGS = pytest.mark.parametrize("averaging", ["schedule_free", "ema"])
LR = 0.02


def trained(steps: int = 3, **options: Any) -> tuple[Little, AMSF]:
    model = Little()
    optimizer = AMSF(model, **{"lr": LR, "weight_decay": 0.1, **options})
    fit(model, optimizer, steps)
    return model, optimizer


def test_it_is_an_optimizer() -> None:
    model, optimizer = trained(0)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "AMSF" in repr(optimizer)
    assert optimizer.defaults["lr"] == LR
    assert optimizer.param_groups[0]["params"] == list(model.parameters())


@pytest.mark.parametrize("form", ["model", "named", "plain", "groups", "named groups", "generator"])
def test_parameters_come_in_every_form_torch_takes(form: str) -> None:
    models = [Little(), Little()]
    model, theirs = models
    forms: dict[str, Any] = {
        "model": model,
        "named": model.named_parameters(),
        "plain": list(model.parameters()),
        "groups": [{"params": list(model.parameters())}],
        "named groups": [{"params": list(model.named_parameters())}],
        "generator": (param for param in model.parameters()),
    }
    fit(model, AMSF(forms[form], lr=LR, blocks="row"), 3)
    fit(theirs, AMSF(theirs, lr=LR, blocks="row"), 3)
    assert_same_bits(model, theirs)


def test_a_parameter_under_two_names_is_one_parameter() -> None:
    model, theirs = Little(), Little()
    every_name = [*model.named_parameters(), ("again.weight", model.up_proj.weight)]
    fit(model, AMSF(every_name, lr=LR), 3)
    fit(theirs, AMSF(theirs, lr=LR), 3)
    assert_same_bits(model, theirs)


@AVERAGINGS
def test_it_learns(averaging: str) -> None:
    losses = fit(*trained(0, averaging=averaging), 60)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


# Closures, gradients, hooks ---------------------------------------------------------------------


def test_a_closure_is_called_once_with_gradients_enabled() -> None:
    model, theirs = Little(), Little()
    optimizer, calls = AMSF(model, lr=LR), []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return backward(model, 0)

    with torch.no_grad():
        loss = optimizer.step(closure)
    fit(theirs, AMSF(theirs, lr=LR), 1)
    assert calls == [True]
    assert loss == Little().loss(0)
    assert_same_bits(model, theirs)


def test_a_step_without_closure_returns_nothing() -> None:
    _, optimizer = trained(1)
    assert optimizer.step() is None


def test_gradients_are_read_and_not_changed() -> None:
    model, optimizer = trained(1)
    backward(model, 1)
    before = [param.grad.clone() for param in model.parameters()]
    optimizer.step()
    assert_same_bits([param.grad for param in model.parameters()], before)


def test_zero_grad_forgets_or_zeroes() -> None:
    model, optimizer = trained(1)
    optimizer.zero_grad(set_to_none=False)
    assert all(not param.grad.any() for param in model.parameters())
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


def test_gradients_of_zero_only_decay_and_average() -> None:
    model, theirs = Little(), Little()
    optimizer = AMSF(
        model, lr=LR, averaging="ema", blocks="element", weight_decay=0.1, betas=(0.9, 0.95)
    )
    adamw = torch.optim.AdamW(theirs.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    for net, its in ((model, optimizer), (theirs, adamw)):
        for param in net.parameters():
            param.grad = torch.zeros_like(param)
        its.step()
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=0.0)


def test_hooks_of_torch_are_called() -> None:
    model, optimizer = trained(0)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before step"))
    optimizer.register_step_post_hook(lambda *_: called.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda *_: called.append("before save"))
    optimizer.register_state_dict_post_hook(lambda *_: called.append("after save"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: called.append("before load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: called.append("after load"))
    fit(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    expected = ["before step", "after step", "before save", "after save"]
    assert called == [*expected, "before load", "after load"]


def test_a_load_hook_may_replace_the_state_dict() -> None:
    _, source = trained(3)
    saved = copy.deepcopy(source.state_dict())
    _, optimizer = trained(0)
    optimizer.register_load_state_dict_pre_hook(lambda _, wrapped: wrapped["inside"])
    optimizer.load_state_dict({"inside": saved})
    assert_same_bits(optimizer.state_dict(), saved)


# Learning rates ---------------------------------------------------------------------------------


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0 / (1 + step)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=LR, total_steps=12, cycle_momentum=False
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[4],
    ),
}


@AVERAGINGS
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_torch_sets_the_learning_rate(averaging: str, name: str) -> None:
    """The same as setting the scheduler's rates by hand."""
    model, theirs = Little(), Little()
    optimizer, by_hand = (AMSF(m, lr=LR, averaging=averaging) for m in (model, theirs))
    scheduler = SCHEDULERS[name](optimizer)
    rates = []
    for step in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        fit(model, optimizer, [step], scheduler=scheduler)
        by_hand.param_groups[0]["lr"] = rates[-1]
        fit(theirs, by_hand, [step])
    assert len(set(rates)) > 3
    assert_same_bits(model, theirs)


def test_one_cycle_with_its_momentum_cycle_is_that_of_adamw() -> None:
    """It also moves beta1, in optimizers that call it betas[0]."""
    model, theirs = Little(torch.float64), Little(torch.float64)
    optimizer = AMSF(model, averaging="ema", blocks="element", lr=LR, betas=(0.9, 0.95))
    adamw = torch.optim.AdamW(theirs.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    for net, its in ((model, optimizer), (theirs, adamw)):
        fit(net, its, 10, scheduler=lr_scheduler.OneCycleLR(its, max_lr=LR, total_steps=12))
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-12)


def test_one_cycle_survives_a_state_dict() -> None:
    """It writes max_lr and min_lr into the group, where AMSF has a max_lr of its own."""
    model, optimizer = trained(0)
    fit(model, optimizer, 3, scheduler=lr_scheduler.OneCycleLR(optimizer, LR, total_steps=12))
    _, fresh = trained(0)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_bits(fresh.state_dict(), optimizer.state_dict())


def test_reduce_on_plateau_lowers_the_learning_rate() -> None:
    model, optimizer = trained(0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for step in range(3):
        fit(model, optimizer, [step])
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == LR / 4


@AVERAGINGS
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_learning_rate_may_be_a_tensor(averaging: str, shape: tuple[int, ...]) -> None:
    rate = torch.full(shape, LR)
    options = {"averaging": averaging, "weight_decay": 0.1, "warmup_steps": 2}
    model, theirs = Little(), Little()
    fit(model, AMSF(model, lr=rate, **options), 5)
    fit(theirs, AMSF(theirs, lr=float(rate), **options), 5)
    assert_same_bits(model, theirs)


def test_the_learning_rate_tensor_is_the_user_s_own() -> None:
    """As in torch.optim: filling it changes the next step."""
    rate = torch.tensor(LR)
    model, theirs = Little(), Little()
    optimizer, by_hand = AMSF(model, lr=rate), AMSF(theirs, lr=float(rate))
    fit(model, optimizer, 2)
    fit(theirs, by_hand, 2)
    rate.fill_(0.5)
    by_hand.param_groups[0]["lr"] = 0.5
    fit(model, optimizer, 2)
    fit(theirs, by_hand, 2)
    assert_same_bits(model, theirs)


def test_a_scheduler_drives_a_learning_rate_tensor() -> None:
    model, theirs = Little(), Little()
    ours, other = AMSF(model, lr=torch.tensor(0.5)), AMSF(theirs, lr=0.5)
    for net, its in ((model, ours), (theirs, other)):
        fit(net, its, 6, scheduler=lr_scheduler.LambdaLR(its, lambda step: 0.5**step))
    assert_same_bits(model, theirs)


# Mixed precision --------------------------------------------------------------------------------


def scaled_step(model: Little, optimizer: AMSF, scaler: Any, step: int, *, spoil: bool) -> None:
    model.zero_grad()
    scaler.scale(model.loss(step)).backward()
    if spoil:
        model.norm.weight.grad[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()


@AVERAGINGS
def test_a_grad_scaler_changes_nothing_but_skips_overflows(averaging: str) -> None:
    model, theirs = Little(), Little()
    optimizer, plain = (AMSF(m, lr=LR, averaging=averaging) for m in (model, theirs))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        before = everything(model, optimizer)
        scaled_step(model, optimizer, scaler, step, spoil=step == 3)
        if step == 3:
            assert_same_bits(everything(model, optimizer), before)
    assert scaler.get_scale() == 2.0**9
    fit(theirs, plain, [0, 1, 2, 4, 5])
    assert_same_bits(model, theirs)
    assert_same_bits(optimizer.state_dict(), plain.state_dict())


def test_autocast_trains_as_it_does_with_torch_s_own() -> None:
    model, theirs = Little(), Little()
    ours = AMSF(model, lr=LR, averaging="ema", blocks="element", betas=(0.9, 0.95))
    adamw = torch.optim.AdamW(theirs.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        fit(model, ours, 3)
        fit(theirs, adamw, 3)
    for mine, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


# Copies -----------------------------------------------------------------------------------------


def through_pickle(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def through_torch_save(pair: Any) -> Any:
    memory = io.BytesIO()
    torch.save(pair, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


@AVERAGINGS
@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_goes_on_training_identically(averaging: str, copy_of: Any) -> None:
    model, optimizer = trained(3, averaging=averaging)
    twin, its = copy_of((model, optimizer))
    frozen = everything(twin, its)
    fit(model, optimizer, range(3, 6))
    assert_same_bits(everything(twin, its), frozen)  # they share nothing
    fit(twin, its, range(3, 6))
    assert_same_bits(everything(twin, its), everything(model, optimizer))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle])
def test_a_copy_made_in_eval_mode_returns_to_the_same_weights(copy_of: Any) -> None:
    model, optimizer = trained(3)
    optimizer.eval()
    twin, its = copy_of((model, optimizer))
    optimizer.train()
    its.train()
    assert_same_bits(twin, model)


# Parameter groups -------------------------------------------------------------------------------


def split(model: Little) -> tuple[list[Any], list[Any]]:
    named = list(model.named_parameters())
    return named[:1], named[1:]


OWN_OPTIONS: list[dict[str, Any]] = [
    {"blocks": "tensor"},
    {"betas": (0.5, 0.9)},
    {"lr": 0.5, "weight_decay": 0.3, "eps": 1e-3},
    {"averaging": "ema"},
    {"warmup_steps": 4, "r": 2.0, "weight_lr_power": 1.0},
    {"blocks": [{"pattern": "weight", "kind": "element"}]},
    {"decay": "matrices"},
    {"decouple_lr": True, "weight_decay": 1e-3},
    {"state_storage": "bf16"},
]


@pytest.mark.parametrize("own", OWN_OPTIONS, ids=str)
def test_a_group_has_options_of_its_own(own: dict[str, Any]) -> None:
    """Two groups of one optimizer are two optimizers."""
    model, theirs = Little(), Little()
    first, second = split(model)
    both = AMSF([{"params": first}, {"params": second, **own}], lr=LR, weight_decay=0.1)
    fit(model, both, 5)
    first, second = split(theirs)
    one = AMSF(first, lr=LR, weight_decay=0.1)
    other = AMSF(second, **{"lr": LR, "weight_decay": 0.1, **own})
    fit(theirs, one, 5, before_step=lambda _: other.step())
    assert_same_bits(model, theirs)


def test_a_group_added_in_flight_starts_its_own_count() -> None:
    model, theirs = Little(), Little()
    first, second = split(model)
    both = AMSF(first, lr=LR, warmup_steps=3)
    fit(model, both, 4)
    both.add_param_group({"params": second, "lr": 0.1})
    fit(model, both, range(4, 8))

    first, second = split(theirs)
    one = AMSF(first, lr=LR, warmup_steps=3)
    fit(theirs, one, 4)
    other = AMSF(second, lr=0.1, warmup_steps=3)
    fit(theirs, one, range(4, 8), before_step=lambda _: other.step())
    assert_same_bits(model, theirs)


def test_an_added_group_has_complete_state_at_once() -> None:
    model = Little()
    first, second = split(model)
    optimizer = AMSF(first)
    optimizer.add_param_group({"params": second})
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))
    assert all("gap" in entries for entries in optimizer.state_dict()["state"].values())


def test_a_group_added_in_eval_mode_is_in_eval_mode() -> None:
    model = Little()
    first, second = split(model)
    optimizer = AMSF(first)
    fit(model, optimizer, 2)
    optimizer.eval()
    optimizer.add_param_group({"params": second})
    assert [group["train_mode"] for group in optimizer.param_groups] == [False, False]
    optimizer.train()
    fit(model, optimizer, 2)


@pytest.mark.parametrize(
    ("group", "error"),
    [
        ({"lr": -1.0}, ValueError),
        ({"betas": (0.9, 1.5)}, ValueError),
        ({"blocks": "rows"}, ValueError),
        ({"blocks": [{"pattern": "weight", "kind": "head", "head_dim": 7}]}, ValueError),
        ({"averaging": "sgd"}, ValueError),
        ({"head_dim": 0}, ValueError),
        ({"params": [("z", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))]}, TypeError),
    ],
    ids=str,
)
def test_a_group_with_a_mistake_is_not_added(group: dict[str, Any], error: type[Exception]) -> None:
    model, theirs = Little(), Little()
    first, second = split(model)
    optimizer = AMSF(first, lr=LR)
    fit(model, optimizer, 2)
    with pytest.raises(error):
        optimizer.add_param_group({"params": second, **group})
    assert len(optimizer.param_groups) == 1
    fit(model, optimizer, [2, 3])
    fit(theirs, AMSF(split(theirs)[0], lr=LR), 4)
    assert_same_bits(model, theirs)


def test_a_group_may_be_empty() -> None:
    model, theirs = Little(), Little()
    params = list(model.parameters())
    fit(model, AMSF([{"params": []}, {"params": params}], lr=LR, blocks="row"), 3)
    fit(theirs, AMSF(theirs, lr=LR, blocks="row"), 3)
    assert_same_bits(model, theirs)


def test_a_parameter_cannot_be_in_two_groups() -> None:
    model = Little()
    optimizer = AMSF(model, lr=LR)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [("again", model.norm.weight)]})
    fit(model, optimizer, 2)


# Reports ----------------------------------------------------------------------------------------


@AVERAGINGS
@pytest.mark.parametrize("state_storage", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_adds_up_to_the_bytes_of_the_tensors(
    averaging: str, state_storage: str, dtype: torch.dtype
) -> None:
    model = Little(dtype)
    optimizer = AMSF(model, averaging=averaging, state_storage=state_storage)

    def size(tensors: Any) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    memory = optimizer.memory()
    line = "gap" if averaging == "schedule_free" else "exp_avg"
    assert memory["weights"] == size(model.parameters())
    assert memory[line] == size(entries[line] for entries in optimizer.state.values())
    assert memory["v"] == size(entries["exp_avg_sq"] for entries in optimizer.state.values())
    errors = [e["weight_error"] for e in optimizer.state.values() if "weight_error" in e]
    assert memory["error_bits"] == size(errors)
    assert bool(errors) == (dtype == torch.bfloat16)
    assert memory["total"] == sum(value for key, value in memory.items() if key != "total")


def test_memory_shows_the_weights_kept_in_eval_mode() -> None:
    model, optimizer = trained(1)
    before = optimizer.memory()
    optimizer.eval()
    inside = optimizer.memory()
    assert inside["total"] - before["total"] == before["weights"]
    optimizer.train()
    assert optimizer.memory() == before


def test_explain_lists_every_parameter() -> None:
    model, optimizer = trained(0)
    table = str(optimizer.explain())
    assert all(name in table for name, _ in model.named_parameters())
