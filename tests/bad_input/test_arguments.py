"""A wrong argument gets one line: which argument, which value, what is allowed, what to do."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from models import Little, assert_same_bits
from torch import nn

from amsf_dist import AMSF, explain
from amsf_dist.hyper import Hyper

NAN, INF = float("nan"), float("inf")

# argument, value, error, what the message says besides the argument's name
WRONG: list[tuple[str, Any, type[Exception], list[str]]] = [
    ("lr", -1e-3, ValueError, ["-0.001", ">= 0"]),
    ("lr", NAN, ValueError, ["nan", "finite", ">= 0"]),
    ("lr", INF, ValueError, ["inf", "finite", ">= 0"]),
    ("lr", "1e-3", TypeError, ["'1e-3'", "number", "write 1.0e-3"]),
    ("lr", None, TypeError, ["None", "number"]),
    ("lr", True, TypeError, ["True", "number"]),
    ("lr", torch.tensor([0.1, 0.2]), ValueError, ["(2,)", "one number"]),
    ("lr", torch.tensor(-1.0), ValueError, ["-1.0", ">= 0"]),
    ("lr", torch.tensor(NAN), ValueError, ["nan", "finite"]),
    ("betas", 0.9, TypeError, ["0.9", "two numbers"]),
    ("betas", (0.9,), TypeError, ["(0.9,)", "two numbers"]),
    ("betas", (0.9, 0.95, 0.99), TypeError, ["(0.9, 0.95, 0.99)", "two numbers"]),
    ("betas", "0.9, 0.95", TypeError, ["'0.9, 0.95'", "two numbers"]),
    ("betas", ("0.9", 0.95), TypeError, ["beta1", "'0.9'", "number"]),
    ("betas", (-0.1, 0.95), ValueError, ["beta1", "-0.1", ">= 0"]),
    ("betas", (0.9, 1.0), ValueError, ["beta2", "1.0", "[0, 1)"]),
    ("betas", (1.5, 0.9), ValueError, ["beta1", "1.5", "[0, 1)"]),
    ("betas", (NAN, 0.9), ValueError, ["beta1", "nan", "finite"]),
    ("eps", -1e-8, ValueError, ["-1e-08", ">= 0"]),
    ("eps", "1e-8", TypeError, ["'1e-8'", "write 1.0e-3"]),
    ("eps", INF, ValueError, ["inf", "finite"]),
    ("weight_decay", -0.1, ValueError, ["-0.1", ">= 0"]),
    ("weight_decay", NAN, ValueError, ["nan", "finite"]),
    ("weight_decay", [0.1], TypeError, ["[0.1]", "number"]),
    ("averaging", "schedulefree", ValueError, ["'schedulefree'", "did you mean 'schedule_free'"]),
    ("averaging", "adamw", ValueError, ["'adamw'", "'ema'", "'schedule_free'"]),
    ("averaging", None, ValueError, ["None", "'ema'", "'schedule_free'"]),
    ("averaging", True, ValueError, ["True", "'ema'"]),
    ("blocks", "rows", ValueError, ["'rows'", "did you mean 'row'"]),
    ("blocks", "factorised", ValueError, ["'factorised'", "did you mean 'factored'"]),
    ("blocks", None, TypeError, ["None", "'auto'"]),
    ("blocks", [{"pattern": "(", "kind": "row"}], ValueError, ["'('", "regular expression"]),
    ("head_dim", 0, ValueError, ["0", ">= 1"]),
    ("head_dim", -64, ValueError, ["-64", ">= 1"]),
    ("head_dim", 64.0, TypeError, ["64.0", "whole number"]),
    ("head_dim", True, TypeError, ["True", "whole number"]),
    ("head_dim", "64", TypeError, ["'64'", "whole number"]),
    ("warmup_steps", -1, ValueError, ["-1", ">= 0"]),
    ("warmup_steps", 0.1, TypeError, ["0.1", "whole number"]),
    ("warmup_steps", None, TypeError, ["None", "whole number"]),
    ("r", -1.0, ValueError, ["-1.0", ">= 0"]),
    ("r", NAN, ValueError, ["nan", "finite"]),
    ("weight_lr_power", -2.0, ValueError, ["-2.0", ">= 0"]),
    ("weight_lr_power", "2", TypeError, ["'2'", "number"]),
    ("decay", "matrix", ValueError, ["'matrix'", "'all'", "did you mean 'matrices'"]),
    ("decay", None, ValueError, ["None", "'all'", "'matrices'"]),
    ("decouple_lr", 1, TypeError, ["1", "True or False"]),
    ("decouple_lr", "yes", TypeError, ["'yes'", "True or False"]),
    ("max_lr", 0.0, ValueError, ["0.0", "> 0"]),
    ("max_lr", -1.0, ValueError, ["-1.0", "> 0"]),
    ("max_lr", "1e-3", TypeError, ["'1e-3'", "number"]),
    ("weight_storage", "fp32", ValueError, ["'fp32'", "'native'"]),
    ("weight_storage", None, ValueError, ["None", "'auto'", "'native'"]),
    ("state_storage", "fp16", ValueError, ["'fp16'", "'fp32'", "'bf16'"]),
    ("state_storage", "float32", ValueError, ["'float32'", "'fp32'"]),
    ("lr_adaptation", "polyak", ValueError, ["'polyak'", "None"]),
    ("seed", -1, ValueError, ["-1", ">= 0"]),
    ("seed", 0.5, TypeError, ["0.5", "whole number"]),
    ("seed", None, TypeError, ["None", "whole number"]),
    ("deterministic", 1, TypeError, ["1", "True or False"]),
    ("clip", "rows", ValueError, ["'rows'", "'block'"]),
    ("clip", "norm", ValueError, ["max_norm"]),
    ("max_norm", 0.0, ValueError, ["0.0", "> 0"]),
    ("max_norm", "1", TypeError, ["'1'", "number"]),
    ("nonfinite", "skip", ValueError, ["'skip'", "'step'", "'block'"]),
]
WRONG_IDS = [f"{argument}={value!r}" for argument, value, _, _ in WRONG]
EVERY_WRONG = pytest.mark.parametrize(("argument", "value", "error", "says"), WRONG, ids=WRONG_IDS)


def check_message(message: str, argument: str, says: list[str]) -> None:
    named = ["beta1", "beta2", "betas"] if argument == "betas" else [argument]
    assert any(name in message for name in named), message
    for part in says:
        assert part in message, message
    assert "\n" not in message


def test_the_table_knows_every_argument() -> None:
    fields = {field.name for field in dataclasses.fields(Hyper)}
    assert {argument for argument, *_ in WRONG} == fields


@EVERY_WRONG
def test_a_wrong_argument_is_refused_and_nothing_is_built(
    argument: str, value: Any, error: type[Exception], says: list[str]
) -> None:
    model, untouched = Little(), Little()
    with pytest.raises(error) as raised:
        AMSF(model, **{argument: value})
    check_message(str(raised.value), argument, says)
    assert_same_bits(model, untouched)
    assert all(param.grad is None and not param._backward_hooks for param in model.parameters())


@EVERY_WRONG
def test_a_wrong_option_of_a_group_is_refused_and_the_group_left_as_it_was(
    argument: str, value: Any, error: type[Exception], says: list[str]
) -> None:
    group = {"params": list(Little().named_parameters()), argument: value}
    keys = list(group)
    with pytest.raises(error) as raised:
        AMSF([group])
    check_message(str(raised.value), argument, says)
    assert list(group) == keys


@EVERY_WRONG
def test_explain_refuses_what_the_optimizer_refuses(
    argument: str, value: Any, error: type[Exception], says: list[str]
) -> None:
    with pytest.raises(error) as raised:
        explain(Little(), **{argument: value})
    check_message(str(raised.value), argument, says)


@pytest.mark.parametrize(
    ("argument", "value", "use"),
    [
        ("lr_adaptation", "grad_norm", "None"),
    ],
)
def test_a_word_of_a_later_version_is_refused_with_what_to_use_instead(
    argument: str, value: str, use: str
) -> None:
    """Never silently replaced by something else. (A word that has arrived leaves this table.)"""
    with pytest.raises(ValueError) as raised:
        AMSF(Little(), **{argument: value})
    message = str(raised.value)
    for part in (argument, repr(value), "not in this version", "use", use):
        assert part in message


def test_an_argument_that_does_not_exist_is_named() -> None:
    with pytest.raises(TypeError, match="momentum"):
        AMSF(Little(), momentum=0.9)  # type: ignore[call-arg]


def test_decoupled_decay_from_a_learning_rate_of_zero_needs_max_lr() -> None:
    with pytest.raises(ValueError, match=r"decouple_lr=True.*lr is 0\.0; pass max_lr"):
        AMSF(Little(), lr=0.0, decouple_lr=True)


def test_a_group_that_cannot_be_cut_is_refused_by_name() -> None:
    params = [("layers.0.self_attn.q_proj.weight", nn.Parameter(torch.ones(8, 4)))]
    with pytest.raises(ValueError, match=r"head_dim=3 does not divide the 8 rows.*q_proj"):
        AMSF(params, head_dim=3)
    with pytest.raises(ValueError, match=r"adam_mini.*q_proj.*pass head_dim="):
        AMSF(params, blocks="adam_mini")


@pytest.mark.parametrize(
    ("params", "error", "says"),
    [
        ([], ValueError, "empty parameter list"),
        (torch.ones(3), TypeError, "iterable"),
        ([1.0, 2.0], TypeError, "Tensors"),
        ([{"params": {nn.Parameter(torch.ones(3))}}], TypeError, "ordered"),
        ([torch.ones(3, requires_grad=True) * 2], ValueError, "non-leaf"),
        ([("a", nn.Parameter(torch.ones(3))), nn.Parameter(torch.ones(3))], ValueError, "names"),
        ([{"params": [nn.Parameter(torch.ones(3))]}, 3], TypeError, "dict"),
        (Little().requires_grad_(False), ValueError, "empty parameter list"),
    ],
    ids=["nothing", "tensor", "numbers", "set", "result", "half named", "half groups", "frozen"],
)
def test_what_is_no_collection_of_parameters_is_refused(
    params: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        AMSF(params)


@pytest.mark.parametrize("key", ["lr", "betas", "weight_decay", "warmup_steps"])
def test_a_state_dict_with_an_impossible_value_is_refused_and_changes_nothing(key: str) -> None:
    optimizer = AMSF(Little())
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][key] = "nonsense"
    with pytest.raises((TypeError, ValueError), match=key):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][key] != "nonsense"
