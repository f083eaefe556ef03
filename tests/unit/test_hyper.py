"""Hyper-parameters: one place for defaults and ranges. Refusals are in bad_input/."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest
import torch

from amsf_dist import AMSF
from amsf_dist.hyper import Hyper


def test_the_optimizer_s_arguments_are_its_fields_with_the_same_defaults() -> None:
    arguments = inspect.signature(AMSF.__init__).parameters
    defaults = {
        name: argument.default
        for name, argument in arguments.items()
        if name not in ("self", "params")
    }
    assert defaults == {field.name: field.default for field in dataclasses.fields(Hyper)}


def test_all_but_the_first_five_are_keywords_only() -> None:
    arguments = inspect.signature(AMSF.__init__).parameters
    positional = [n for n, a in arguments.items() if a.kind is a.POSITIONAL_OR_KEYWORD]
    assert positional == ["self", "params", "lr", "betas", "eps", "weight_decay"]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.0},
        {"lr": 1},
        {"lr": torch.tensor(0.1)},
        {"lr": torch.tensor([0.1])},
        {"betas": (0.0, 0.0)},
        {"betas": [0.9, 0.999]},
        {"eps": 0.0},
        {"weight_decay": 0},
        {"averaging": "ema"},
        {"blocks": "adam_mini"},
        {"head_dim": 1},
        {"warmup_steps": 10**9},
        {"r": 5.0},
        {"weight_lr_power": 0.0},
        {"decay": "matrices"},
        {"decouple_lr": True},
        {"decouple_lr": True, "lr": 0.0, "max_lr": 1.0},
        {"max_lr": 1e-9},
        {"weight_storage": "native"},
        {"state_storage": "bf16"},
        {"lr_adaptation": None},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_values_at_the_edge_of_their_range_are_taken(options: dict[str, Any]) -> None:
    hyper = Hyper.of(options)
    for name, value in options.items():
        expected = tuple(value) if name == "betas" else value
        assert getattr(hyper, name) == expected


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Hyper().lr = 1.0  # type: ignore[misc]


def test_a_group_has_every_field_and_max_lr_where_it_is_used() -> None:
    group = Hyper(lr=0.25).as_group()
    assert list(group) == [field.name for field in dataclasses.fields(Hyper)]
    assert group["max_lr"] is None
    assert Hyper(lr=0.25, decouple_lr=True).as_group()["max_lr"] == 0.25
    assert Hyper(lr=torch.tensor(0.25), decouple_lr=True).as_group()["max_lr"] == 0.25
    assert Hyper(lr=0.25, decouple_lr=True, max_lr=0.5).as_group()["max_lr"] == 0.5


def test_a_group_keeps_the_learning_rate_tensor_and_copies_the_rules() -> None:
    """The tensor is the user's handle on the rate; the list of rules is ours from then on."""
    rate, rules = torch.tensor(0.25), [{"pattern": "weight", "kind": "row"}]
    group = Hyper(lr=rate, blocks=rules).as_group()
    assert group["lr"] is rate
    rules[0]["kind"] = "element"
    assert group["blocks"] == [{"pattern": "weight", "kind": "row"}]


def test_an_unknown_key_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(TypeError, match=r"'wieght_decay'; did you mean 'weight_decay'\?"):
        Hyper.of({"wieght_decay": 0.1})
    with pytest.raises(TypeError, match="'qqq'; known: lr, betas, eps"):
        Hyper.of({"qqq": 0.1})


def test_it_can_be_copied_and_pickled() -> None:
    hyper = Hyper(lr=0.5, blocks=[{"pattern": "weight", "kind": "row"}])
    assert copy.deepcopy(hyper) == hyper
    assert pickle.loads(pickle.dumps(hyper)) == hyper
