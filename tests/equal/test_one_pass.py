"""Where blocks decide for themselves the CPU kernel takes one pass, with the same numbers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import assert_same_bits
from ranks import run_ranks
from torch import Tensor, nn

from amsf_dist import AMSF
from amsf_dist.kernels.choice import AMSF_KERNEL
from amsf_dist.kernels.native import launch
from amsf_dist.kernels.native.build import library

RULES = ("schedule_free", "ema")
STATES = ("fp32", "bf16", "int8")
WEIGHTS = [
    (torch.float32, "native"),
    (torch.bfloat16, "bf16+8"),
    (torch.bfloat16, "bf16+16"),
    (torch.bfloat16, "stochastic"),
    (torch.bfloat16, "kahan"),
    (torch.float16, "bf16+8"),
]
# one tile and several, rows that are multiples of a group and of nothing, a block beyond a tile
SHAPES = {
    "many.weight": (300, 256),
    "small.weight": (64, 64),
    "odd.weight": (5, 333),
    "one.weight": (1, 70_000),
    "conv.weight": (8, 4, 3, 3),
    "norm.weight": (77,),
}


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    assert library() is not None, "these tests need a C++ compiler (g++)"
    names: list[str] = []
    plain = launch._call

    def listed(name: str, table: Any) -> int:
        names.append(name)
        return plain(name, table)

    monkeypatch.setattr(launch, "_call", listed)
    yield names


class Shapes(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            values = torch.randn(shape, generator=generator) * 0.1
            self.register_parameter(name.replace(".", "_"), nn.Parameter(values.to(dtype)))


def spoiled(step: int, name: str, grad: Tensor) -> None:
    """In step 1 one block of each matrix, and more in step 2; in steps 0 and 3 nothing."""
    rows = {1: (2,), 2: (0, 3, len(grad) - 1)}.get(step, ())
    for row in rows:
        if row < len(grad):
            grad[row].view(-1)[-1] = float("inf") if row else float("nan")


def trained(
    monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype, **options: Any
) -> Any:
    monkeypatch.setenv(AMSF_KERNEL, kernel)
    spoils = options.pop("spoils", True)
    model = Shapes(dtype)
    optimizer = AMSF(model, **{"lr": 0.02, "weight_decay": 0.1, "blocks": "row", **options})
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for name, param in model.named_parameters():
            # sums of squares of such numbers have no rounding, whatever their order
            whole = torch.randint(-8, 9, param.shape, generator=generator)
            param.grad = (whole / 64.0).to(dtype)
            if spoils:
                spoiled(step, name, param.grad)
        optimizer.step()
    numbers = {name: param.detach().clone() for name, param in model.named_parameters()}
    for index, entries in optimizer.state_dict()["state"].items():
        numbers |= {f"{index} {k}": v for k, v in entries.items() if isinstance(v, Tensor)}
    return numbers, optimizer.skipped_steps


@pytest.mark.parametrize("blocks", ["row", "tensor", "auto"])
@pytest.mark.parametrize("averaging", RULES)
def test_one_pass_has_the_bits_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, calls: list[str], averaging: str, blocks: str
) -> None:
    for (dtype, weights), state in itertools.product(WEIGHTS, STATES):
        options: dict[str, Any] = {
            "averaging": averaging,
            "blocks": blocks,
            "weight_storage": weights,
            "state_storage": state,
            "nonfinite": "block",
        }
        ours, skipped = trained(monkeypatch, "auto", dtype, **options)
        assert calls.count("amsf_step") == 4, options
        calls.clear()
        theirs, counted = trained(monkeypatch, "reference", dtype, **options)
        assert not calls
        assert_same_bits(ours, theirs, str(options))
        assert skipped == counted == 2


@pytest.mark.parametrize("clip", [None, "block"])
def test_finite_steps_do_not_depend_on_what_others_are_held_back(
    monkeypatch: pytest.MonkeyPatch, calls: list[str], clip: str | None
) -> None:
    options = {"spoils": False, "clip": clip}
    whole, _ = trained(monkeypatch, "auto", torch.float32, nonfinite="step", **options)
    assert "amsf_step" not in calls
    alone, skipped = trained(monkeypatch, "auto", torch.float32, nonfinite="block", **options)
    assert calls.count("amsf_step") == 4
    assert_same_bits(alone, whole, str(clip))
    assert skipped == 0


def test_a_bad_block_stays_and_all_others_move() -> None:
    model = Shapes(torch.float32)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = AMSF(model, lr=0.02, blocks="row", nonfinite="block")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    model.many_weight.grad[7, 3] = float("nan")  # type: ignore[index]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    moved = (model.many_weight != before["many_weight"]).all(1)
    assert moved.sum() == 299 and not moved[7]
    assert (model.odd_weight != before["odd_weight"]).all()
    state = optimizer.state[model.many_weight]
    assert all(value.isfinite().all() for value in state.values() if isinstance(value, Tensor))


def test_norms_are_refused() -> None:
    for clipping in ({"clip": "norm", "max_norm": 1.0}, {"clip": "tensor"}, {"max_norm": 1.0}):
        with pytest.raises(ValueError, match="clip='block'"):
            AMSF(Shapes(torch.float32), nonfinite="block", **clipping)  # type: ignore[arg-type]


def on_ranks(world_size: int, blocks: str, nonfinite: str) -> Any:
    """In step 1 one number of the first layer's gradient is bad, on the rank that has it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    os.environ[AMSF_KERNEL] = "auto"  # ranks may start with the environment of another test
    names: list[str] = []
    plain = launch._call
    launch._call = lambda name, table: (names.append(name), plain(name, table))[1]  # type: ignore
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 32, bias=False))
    if world_size > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = AMSF(model, lr=0.02, blocks=blocks, nonfinite=nonfinite)
    for step in range(3):
        model(torch.arange(256.0).view(4, 64) / 64.0).square().mean().backward()
        grad = next(model.parameters()).grad
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        if step == 1 and torch.distributed.get_rank() == 0:
            local[3, 5] = float("nan")  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()
    weights = {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach()
        for name, param in model.named_parameters()
    }
    return weights, set(names), optimizer.skipped_steps


@pytest.mark.parametrize(
    ("blocks", "nonfinite", "calls_of_shards"),
    [
        ("row", "step", {"amsf_step"}),  # no block is cut: blocks decide whatever is asked for
        ("row", "block", {"amsf_step"}),
        ("tensor", "block", {"amsf_measure", "amsf_move"}),  # every block is cut
    ],
)
def test_shards_leave_the_blocks_that_one_process_leaves(
    blocks: str, nonfinite: str, calls_of_shards: set[str]
) -> None:
    ((alone, names, skipped),) = run_ranks(1, on_ranks, 1, blocks, "block")
    assert names == {"amsf_step"} and skipped == 1
    for found, names, counted in run_ranks(2, on_ranks, 2, blocks, nonfinite):
        assert names == calls_of_shards
        assert counted == 1 if blocks == "tensor" else counted <= 1  # a rank counts what it sees
        for name, weight in found.items():
            torch.testing.assert_close(weight, alone[name], rtol=1e-5, atol=1e-6)
