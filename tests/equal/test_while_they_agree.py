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
    from torch.distributed.fsdp import FullyShardedDataParallel

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
