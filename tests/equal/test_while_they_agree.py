"""What no other rank has a part of moves while the ranks agree: with the same bits."""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import LAYOUTS, OPTIONS, SHAPES
from layouts import train as train_plain
from models import Transformer, assert_same_bits
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from zero import config, engine_of, train

from amsf_dist import AMSF, reduce
from amsf_dist.kernels.choice import AMSF_KERNEL
from amsf_dist.kernels.native import launch

STEPS = 4
BLOCKS = ("auto", "tensor", "factored")
STORAGES: list[tuple[torch.dtype, str]] = [(torch.float32, "fp32"), (torch.bfloat16, "int8")]
STAGES: dict[str, dict[str, Any]] = {
    "1": {"stage": 1},
    "2 offload": {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}},
    "3 sub-groups": {"stage": 3, "zero": {"sub_group_size": 500}},
}


def here(optimizer: Any) -> dict[str, Tensor]:
    """This rank's memory of everything."""
    found = {}
    for number, holding in enumerate(optimizer.holdings):
        found[f"{number} y"] = holding.memory(holding.param).clone()
        for key, value in optimizer.state[holding.param].items():
            local = value.to_local() if isinstance(value, DTensor) else value
            found[f"{number} {key}"] = local.detach().clone()
    return found


def spied() -> list[str]:
    """What the step does from now on, in order."""
    events: list[str] = []
    call, all_reduce = launch._call, reduce.dist.all_reduce

    def called(name: str, table: Any) -> int:
        events.append(name)
        return call(name, table)

    def reduced(*args: Any, **kwargs: Any) -> Any:
        work = all_reduce(*args, **kwargs)
        if not kwargs.get("async_op"):
            return work
        events.append("send")

        class Work:
            def wait(self) -> None:
                events.append("wait")
                work.wait()

        return Work()

    launch._call = called
    reduce.dist.all_reduce = reduced  # type: ignore[assignment]
    return events


def under_torch(layout: str, shape: str, kernel: str) -> list[str]:
    os.environ[AMSF_KERNEL] = kernel
    events, under = spied(), LAYOUTS[layout]
    for blocks, (dtype, state) in product(BLOCKS, STORAGES):
        found = []
        for nonfinite in ("step", "block"):
            events.clear()
            model = under.wrap(Transformer(SHAPES[shape], dtype=dtype))
            options = {**OPTIONS, "blocks": blocks, "state_storage": state}
            optimizer = AMSF(model, nonfinite=nonfinite, **options)
            parallel = under.tensor_parallel
            train_plain(
                model, optimizer, SHAPES[shape].vocab, range(STEPS), tensor_parallel=parallel
            )
            found.append(here(optimizer))
            assert ("send" in events) <= (nonfinite == "block")
        assert_same_bits(*found, f"{layout} {blocks} {state}")
    return events


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        ("fsdp2", 3),
        ("fsdp2 Shard(1)", 2),
        ("fsdp1 FULL_SHARD flat", 3),
        ("fsdp1 FULL_SHARD original", 2),
        ("tensor parallel x fsdp2", 4),
    ],
)
def test_under_torch(layout: str, world_size: int, kernel: str) -> None:
    shape = "uneven" if "uneven" in LAYOUTS[layout].shapes else "even"
    run_ranks(world_size, under_torch, layout, shape, kernel)


def under_deepspeed() -> None:
    events = spied()
    for (name, settings), blocks, (_, state) in product(STAGES.items(), BLOCKS, STORAGES):
        found = []
        for nonfinite in ("step", "block"):
            amsf = {"blocks": blocks, "state_storage": state, "nonfinite": nonfinite}
            engine = engine_of(Transformer(SHAPES["even"]).float(), config(**settings, amsf=amsf))
            train(engine, SHAPES["even"].vocab, range(STEPS))
            found.append(here(engine.basic_optimizer))
            engine.destroy()
        assert_same_bits(*found, f"ZeRO-{name} {blocks} {state}")
    assert "send" in events


def test_under_deepspeed() -> None:
    run_ranks(2, under_deepspeed)


def a_flat_parameter() -> list[str]:
    """Rows of three matrices in one; the second one's are halved by the shards."""
    os.environ[AMSF_KERNEL] = "auto"
    layers = [nn.Linear(64, rows, bias=False) for rows in (96, 65, 96)]
    whole = FullyShardedDataParallel(nn.Sequential(*layers), device_id=torch.device("cpu"))
    optimizer = AMSF(whole, blocks="row", nonfinite="block")
    (flat,) = whole.parameters()
    events = spied()
    flat.grad = torch.ones_like(flat)
    if dist.get_rank():
        flat.grad[-1] = torch.nan  # of the last row of the third matrix
    before = flat.detach().clone()
    optimizer.step()
    stays = before == flat
    assert int(stays.sum()) == (64 if dist.get_rank() else 0)
    assert bool(stays[-64:].all()) == bool(dist.get_rank())
    return events


def test_the_rest_of_a_flat_parameter_does_not_wait() -> None:
    """The matrix that is cut waits, the one beside it does not."""
    first, second = run_ranks(2, a_flat_parameter)
    assert first == ["amsf_measure", "send", "amsf_step", "wait", "amsf_move"]
    assert second == first[:-1]  # after something that is not finite: by operations of torch


def what_follows_what(world_size: int, kernel: str) -> Any:
    """Of two matrices the first is one block, cut by shards, the other has a block per row."""
    os.environ[AMSF_KERNEL] = kernel
    events = spied()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 32, bias=False))
    if world_size > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = AMSF(
        model,
        lr=0.02,
        blocks=[{"pattern": "^0", "kind": "tensor"}, {"pattern": ".*", "kind": "row"}],
        state_storage="int8",
        nonfinite="block",
    )
    skipped = []
    for step in range(5):
        model(torch.arange(256.0).view(4, 64) / 64.0).square().mean().backward()
        grads = [param.grad for param in model.parameters()]
        first, second = (g.to_local() if isinstance(g, DTensor) else g for g in grads)
        if dist.get_rank() == 0 and step in (1, 3):
            (first if step == 1 else second)[3, 5] = float("inf")  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(optimizer.skipped_steps)
    weights = {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach()
        for name, param in model.named_parameters()
    }
    return weights, events, skipped


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_what_no_other_rank_has_a_part_of_moves_while_the_ranks_agree(kernel: str) -> None:
    ((alone, _, counted),) = run_ranks(1, what_follows_what, 1, kernel)
    assert counted == [0, 1, 1, 2, 2]
    of_a_step = ["amsf_measure", "send", "amsf_step", "wait", "amsf_move"]
    bad_step = of_a_step[:-1]  # the torch operations keep what a bad block has
    if kernel == "reference":
        of_a_step = bad_step = ["send", "wait"]
    found = run_ranks(2, what_follows_what, 2, kernel)
    assert [skipped for _, _, skipped in found] == [[0, 1, 1, 2, 2], [0, 1, 1, 1, 1]]
    for rank, (weights, events, _) in enumerate(found):
        assert events == [
            event
            for step in range(5)
            for event in (bad_step if step == 1 or step == 3 and not rank else of_a_step)
        ]
        for name, weight in weights.items():
            torch.testing.assert_close(weight, alone[name], rtol=1e-5, atol=1e-6)
