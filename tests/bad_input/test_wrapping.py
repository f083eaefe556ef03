"""What cannot be right is refused, with the reason and the cure, before it trains wrongly."""

from __future__ import annotations

import copy

import pytest
import torch
from layouts import SHAPES, fsdp1, fsdp2, loss_of
from models import Transformer
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

from amsf_dist import AMSF


def model_of() -> Transformer:
    return Transformer(SHAPES["even"], dtype=torch.float32)


def message(function: object, *args: object) -> str:
    with pytest.raises((RuntimeError, ValueError)) as caught:
        function(*args)  # type: ignore[operator]
    return str(caught.value)


def wrapped_too_late(how: str) -> str:
    model = model_of()
    optimizer = AMSF(model)
    before = copy.deepcopy(optimizer.state_dict())
    model = fsdp2(model) if how == "fsdp2" else fsdp1("FULL_SHARD", how == "original")(model)
    loss_of(model, SHAPES["even"].vocab, 0).backward()
    said = message(optimizer.step)
    after = optimizer.state_dict() if how == "fsdp2" else before
    assert all(torch.equal(a, after["state"][0][k]) for k, a in before["state"][0].items())
    return said


@pytest.mark.parametrize("how", ["fsdp2", "flat", "original"])
def test_a_model_wrapped_after_the_optimizer_was_built(how: str) -> None:
    for said in run_ranks(2, wrapped_too_late, how):
        assert "fully_shard" in said or "pass the wrapped model" in said, said


def test_a_model_loaded_with_assign_behind_the_optimizer_s_back() -> None:
    model = model_of()
    optimizer = AMSF(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    loss_of(model, SHAPES["even"].vocab, 0).backward()
    said = message(optimizer.step)
    assert "assign=True" in said and "build AMSF last" in said


def slices_without_their_model() -> list[str]:
    model = fsdp1("FULL_SHARD", True)(model_of())
    return [
        message(AMSF, model.parameters()),
        message(AMSF, model.named_parameters()),
    ]


def test_slices_of_flat_parameters_without_the_model_that_knows_them() -> None:
    for nameless, named in run_ranks(2, slices_without_their_model):
        assert "a parameter is a slice of an FSDP1 flat parameter" in nameless
        assert "AMSF(model, ...)" in nameless and "weight" in named


def partial_placement() -> str:
    mesh = init_device_mesh("cpu", (2,))
    tensor = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
    return message(AMSF, [("layer.weight", torch.nn.Parameter(tensor))])


def test_a_placement_that_is_not_understood() -> None:
    for said in run_ranks(2, partial_placement):
        assert "layer.weight" in said and "Partial" in said and "redistribute" in said
