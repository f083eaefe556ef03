"""A learning rate that goes down under schedule_free is told of, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    ReduceLROnPlateau,
    StepLR,
)

from amsf_dist import AMSF


def warnings_of(
    caplog: pytest.LogCaptureFixture, make: Callable[[Any], Any], steps: int = 6, **options: Any
) -> list[str]:
    model = nn.Linear(3, 2)
    optimizer = AMSF(model, **{"lr": 1e-2, **options})
    scheduler = make(optimizer)
    caplog.clear()
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()
    return [record.getMessage() for record in caplog.records if record.name == "amsf_dist.watch"]


DECAYING: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda optimizer: StepLR(optimizer, 2),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, 5),
    "ReduceLROnPlateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=1),
    "warm-up, then down": lambda optimizer: LambdaLR(
        optimizer, lambda step: [0, 1, 2, 1, 0, 0][step - 1]
    ),
}


@pytest.mark.parametrize("name", DECAYING)
def test_a_decaying_scheduler_is_told_of_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    (warning,) = warnings_of(caplog, DECAYING[name])
    assert warning.startswith("lr went down from ") and "schedule_free" in warning
    assert warnings_of(caplog, DECAYING[name], averaging="ema") == []


def test_what_rises_or_stays_is_not(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(caplog, lambda optimizer: None) == []
    assert warnings_of(caplog, lambda optimizer: LinearLR(optimizer, 0.1)) == []
    assert warnings_of(caplog, lambda optimizer: ConstantLR(optimizer, 0.1)) == []


def test_groups_are_not_compared_and_a_loaded_lr_is_no_decay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 1)
    optimizer = AMSF(
        [
            {"params": first.parameters(), "lr": 1e-2},
            {"params": second.parameters(), "lr": 1e-3},
        ]
    )
    saved = optimizer.state_dict()
    for group in optimizer.param_groups:
        group["lr"] *= 10.0

    def step() -> None:
        second(first(torch.ones(1, 3))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    optimizer.load_state_dict(saved)
    step()
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert [record for record in caplog.records if record.name == "amsf_dist.watch"] == []
