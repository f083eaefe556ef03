"""Where gradient release cannot be right it says so, before weights have moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import OPTIONS, SHAPES, fsdp1, loss_of
from models import Transformer
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from zero import config, engine_of

from amsf_dist import AMSF, enable_gradient_release

SHAPE = SHAPES["uneven"]


def transformer() -> Transformer:
    return Transformer(SHAPE, dtype=torch.float32)


def released(**options: Any) -> tuple[Transformer, AMSF]:
    model = transformer()
    optimizer = AMSF(model, **OPTIONS)
    enable_gradient_release(model, optimizer, **options)
    return model, optimizer


def wrapped(kind: str) -> str:
    model: Any = transformer()
    try:
        if kind == "ddp":
            model = DistributedDataParallel(model)
            enable_gradient_release(model, AMSF(model, **OPTIONS))
        elif kind == "ddp later":
            optimizer = AMSF(model, **OPTIONS)
            enable_gradient_release(model, optimizer)
            replicated = DistributedDataParallel(model)
            loss_of(replicated, SHAPE.vocab, 0).backward()
        elif kind == "fsdp1":
            model = fsdp1("FULL_SHARD", True)(model)
            enable_gradient_release(model, AMSF(model, **OPTIONS))
        else:
            engine = engine_of(Transformer(SHAPES["even"], dtype=torch.float32), config(stage=2))
            enable_gradient_release(engine.module, engine.basic_optimizer)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("kind", "cure"),
    [
        ("ddp", "fully_shard on a mesh of"),
        ("ddp later", "fully_shard on a mesh of"),
        ("fsdp1", "FSDP2"),
        ("deepspeed", "FSDP2"),
    ],
)
def test_wrappers_without_final_gradients(kind: str, cure: str) -> None:
    for said in run_ranks(2, wrapped, kind):
        assert cure in said


def test_grad_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="GradScaler.*bf16"):
        released()
    del scaler


def test_two_backward_passes_in_one_step() -> None:
    model, optimizer = released()
    loss_of(model, SHAPE.vocab, 0).backward()
    with pytest.raises(RuntimeError, match="second gradient in one step.*optimizer_accumulation"):
        loss_of(model, SHAPE.vocab, 1).backward()


def test_half_a_step_is_no_state_to_keep() -> None:
    model, optimizer = released()
    loss_of(model, SHAPE.vocab, 0).backward()
    for use in (optimizer.state_dict, optimizer.eval, lambda: optimizer.averaged_state_dict(model)):
        with pytest.raises(RuntimeError, match="half done.*step"):
            use()
    optimizer.step()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="train"):
        loss_of(model, SHAPE.vocab, 1).backward()


def test_deferred_modules_may_have_several() -> None:
    """Two losses, each through all layers: what is deferred moves in step, by the sum."""
    found = []
    for release in (False, True):
        model = transformer()
        optimizer = AMSF(model, **OPTIONS)
        if release:
            enable_gradient_release(model, optimizer, defer=[model])
        for _ in range(3):
            for half in range(2):
                loss_of(model, SHAPE.vocab, half, half, 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([param.detach() for param in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_twice_and_another_model() -> None:
    model, optimizer = released()
    with pytest.raises(ValueError, match="enabled already"):
        enable_gradient_release(model, optimizer)
    with pytest.raises(ValueError, match="none of the model's parameters"):
        enable_gradient_release(nn.Linear(2, 2), AMSF(transformer(), **OPTIONS))
    with pytest.raises(ValueError, match="'exact' or 'state'"):
        released(accumulation="both")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clip": "norm"}, "needs max_norm"),
        ({"clip": "block", "max_norm": 1.0}, "limit of clip='norm'"),
        ({"max_norm": 0.0}, "max_norm"),
        ({"clip": "rows"}, "clip must be one of"),
        ({"clip": "tensor", "deterministic": True}, "clip='block'"),
    ],
)
def test_clipping(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AMSF(transformer(), **options)


def poisoned(release: bool) -> Any:
    model = transformer()
    optimizer = AMSF(model, **OPTIONS)
    if release:
        enable_gradient_release(model, optimizer)
    loss_of(model, SHAPE.vocab, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = [param.detach().clone() for param in model.parameters()]
    (loss_of(model, SHAPE.vocab, 1) * torch.inf).backward()
    optimizer.step()
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    return same, optimizer.skipped_steps


@pytest.mark.parametrize("release", [False, True])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted_once(release: bool) -> None:
    assert poisoned(release) == (True, 1)
