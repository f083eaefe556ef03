"""State dicts as torch.distributed's functions leave them: names for numbers, in another order."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from models import Shape, Transformer, assert_same_bits, fit
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from amsf_dist import AMSF


def build(order: int = 1, seed: int = 0) -> tuple[nn.Module, AMSF]:
    model = Transformer(Shape(), dtype=torch.float32, seed=seed)
    named = list(model.named_parameters())[::order]
    return model, AMSF(named, lr=5e-3, head_dim=8)


def saved(order: int, mode: str, options: StateDictOptions) -> tuple[Any, Any, nn.Module]:
    """Weights and state after five steps, and the model after five more."""
    model, optimizer = build(order)
    fit(model, optimizer, 5)
    getattr(optimizer, mode)()
    kept = model.state_dict(), get_optimizer_state_dict(model, optimizer, options=options)
    weights, state = copy.deepcopy(kept)
    optimizer.train()
    fit(model, optimizer, range(5, 10))
    return weights, state, model


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("how", ["nested", "full", "flattened"])
def test_parameters_in_another_order_get_their_own_state(how: str, mode: str) -> None:
    options = StateDictOptions(
        full_state_dict=how == "full", flatten_optimizer_state_dict=how == "flattened"
    )
    weights, state, expected = saved(-1, mode, options)
    model, optimizer = build(seed=2)
    model.load_state_dict(weights)
    getattr(optimizer, mode)()  # flattened, torch loads only what is there: else y would be missing
    if mode == "eval":
        model.load_state_dict(weights)  # eval() has written over them
    set_optimizer_state_dict(model, optimizer, state, options=options)
    optimizer.train()
    fit(model, optimizer, range(5, 10))
    assert_same_bits(model, expected)


@pytest.mark.parametrize("full", [False, True])
def test_a_state_dict_without_stamps_is_taken_as_it_is(full: bool) -> None:
    """One put together by hand has none; in a full one torch fills in the loading run's."""
    options = StateDictOptions(full_state_dict=full)
    weights, state, expected = saved(1, "eval", options)
    model, optimizer = build(seed=2)
    model.load_state_dict(weights)
    del state["param_groups"][0]["first_weights"]
    set_optimizer_state_dict(model, optimizer, state, options=options)
    optimizer.train()
    fit(model, optimizer, range(5, 10))
    assert_same_bits(model, expected)


@pytest.mark.parametrize("order", [1, -1])
def test_files_of_different_modes_are_refused_in_any_order(order: int) -> None:
    weights, _, _ = saved(order, "eval", StateDictOptions())
    _, state, _ = saved(order, "train", StateDictOptions())
    model, optimizer = build(seed=2)
    model.load_state_dict(weights)
    set_optimizer_state_dict(model, optimizer, state)
    with pytest.raises(RuntimeError, match="files of different modes"):
        fit(model, optimizer, 1)


def test_stamps_are_one_string_by_name() -> None:
    """Lists would be merged with those of the optimizer that loads, and dicts be cut in pieces."""
    model, optimizer = build()
    (group,) = optimizer.state_dict()["param_groups"]
    written = json.loads(group["first_weights"])
    first = {name: float(param.detach().flatten()[0]) for name, param in model.named_parameters()}
    assert written == {"train_mode": True, "weights": first}
