"""On a device the host never waits: a step reads nothing back, and skips by masks.

Run here on the CPU, told that it is a device. The result is that of the host's own path.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Little, Shape, Transformer, assert_same_bits, backward, everything
from waits import NoWaiting, a_device

from amsf_dist import AMSF

OPTIONS: list[dict[str, Any]] = [
    {},
    {"averaging": "ema"},
    {"blocks": "adam_mini", "weight_decay": 0.1, "decay": "matrices"},
    {"blocks": "element", "averaging": "ema", "weight_decay": 0.1},
    {"blocks": "tensor", "warmup_steps": 3, "r": 1.0, "weight_lr_power": 1.0},
    {"decouple_lr": True, "weight_decay": 0.01},
    {"state_storage": "bf16"},
    {"lr": torch.tensor(0.02)},
]
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS, ids=str)


def quiet_fit(model: Any, optimizer: AMSF, steps: Any, bad: tuple[int, ...] = ()) -> None:
    """Train; every step under `NoWaiting`; gradients of the bad steps are spoiled."""
    for step in steps:
        backward(model, step)
        if step in bad:
            list(model.parameters())[step % 3].grad.view(-1)[0] = float("nan")
        with NoWaiting():
            optimizer.step()


def fit_on_host(model: Any, optimizer: AMSF, steps: Any, bad: tuple[int, ...] = ()) -> None:
    for step in steps:
        backward(model, step)
        if step in bad:
            list(model.parameters())[step % 3].grad.view(-1)[0] = float("nan")
        optimizer.step()


def test_the_watch_catches_a_wait() -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        float(torch.ones(()))


def test_the_host_path_reads_the_verdict() -> None:
    """So that the tests below are known to take the other path."""
    model = Little()
    backward(model, 0)
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        AMSF(model).step()


@EVERY_OPTION
@pytest.mark.parametrize("bad", [(), (0,), (2, 4)], ids=["finite", "first step bad", "some bad"])
def test_a_step_on_a_device_never_waits_and_equals_the_host_s(
    options: dict[str, Any], bad: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, theirs = Little(), Little()
    ours, plain = AMSF(model, **{"lr": 0.02, **options}), AMSF(theirs, **{"lr": 0.02, **options})
    with a_device(monkeypatch):
        quiet_fit(model, ours, range(6), bad)
    fit_on_host(theirs, plain, range(6), bad)
    assert_same_bits(everything(model, ours), everything(theirs, plain))
    assert ours.skipped_steps == plain.skipped_steps == len(bad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("averaging", ["schedule_free", "ema"])
def test_every_dtype_steps_on_a_device_as_on_the_host(
    dtype: torch.dtype, averaging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, theirs = Little(dtype), Little(dtype)
    ours, plain = (AMSF(m, lr=0.02, averaging=averaging) for m in (model, theirs))
    with a_device(monkeypatch):
        quiet_fit(model, ours, range(5), bad=(1,))
    fit_on_host(theirs, plain, range(5), bad=(1,))
    assert_same_bits(everything(model, ours), everything(theirs, plain))


def test_a_transformer_steps_on_a_device_as_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model, theirs = (Transformer(Shape(layers=2), dtype=torch.float32) for _ in range(2))
    ours, plain = AMSF(model, lr=5e-3), AMSF(theirs, lr=5e-3)
    with a_device(monkeypatch):
        quiet_fit(model, ours, range(10), bad=(3,))
    fit_on_host(theirs, plain, range(10), bad=(3,))
    assert_same_bits(everything(model, ours), everything(theirs, plain))


@pytest.mark.parametrize("averaging", ["schedule_free", "ema"])
def test_missing_gradients_on_a_device_are_counted_as_on_the_host(
    averaging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(model: Little, optimizer: AMSF, watch: Any) -> None:
        for step in range(6):
            backward(model, step)
            if step % 2:
                model.norm.bias.grad = None
            if step == 3:
                model.up_proj.bias.grad[0] = float("inf")
            with watch():
                optimizer.step()

    model, theirs = Little(), Little()
    ours, plain = (AMSF(m, lr=0.02, averaging=averaging) for m in (model, theirs))
    with a_device(monkeypatch):
        train(model, ours, NoWaiting)
    train(theirs, plain, torch.no_grad)
    assert_same_bits(everything(model, ours), everything(theirs, plain))


def test_changing_modes_on_a_device_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Little()
    optimizer = AMSF(model, lr=0.02)
    fit_on_host(model, optimizer, range(3))
    before = everything(model, optimizer)
    with a_device(monkeypatch), NoWaiting():
        optimizer.eval()
        optimizer.averaged_state_dict(model)
        optimizer.train()
    assert_same_bits(everything(model, optimizer), before)
