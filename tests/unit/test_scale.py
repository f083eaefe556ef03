"""A plan for 1,024 ranks: Llama-3-8B's tensors under FSDP2 with torch's fake process group."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import apart
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from amsf_dist import AMSF, explain

transformers = pytest.importorskip("transformers")

WORLD = 1024
RANKS = (0, 517, 1023)
SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "num_hidden_layers": 2,
}


class Planned(NamedTuple):
    """What one of the ranks would send in a step, and what it holds."""

    collectives: int
    floats: int
    numel: int
    moved: bool


def llama() -> Any:
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).bfloat16()


def planned(rank: int, blocks: str) -> Planned:
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
    mesh, model = init_device_mesh("cpu", (WORLD,)), llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh).to_empty(device="cpu")
    for param in model.parameters():
        torch.nn.init.constant_(param, 0.01)
        param.grad = torch.full_like(param, 0.1)
    optimizer = AMSF(model, lr=0.1, blocks=blocks, state_storage="int8")
    optimizer.step()
    (unit,) = optimizer._ready().units
    local = [param.to_local().flatten() for param in model.parameters()]
    moved = all(bool((weights < 0.01).all()) for weights in local)
    return Planned(
        unit.sums.num_collectives, unit.sums.num_floats, sum(map(torch.numel, local)), moved
    )


@pytest.mark.parametrize("blocks", ["auto", "factored"])
def test_every_one_of_1024_ranks_joins_the_same_collective(blocks: str) -> None:
    on_paper = explain(llama(), mesh=WORLD, blocks=blocks).cut_blocks
    found = apart(planned, [(rank, blocks) for rank in RANKS])
    assert {(rank.collectives, rank.floats) for rank in found} == {(1, on_paper + 1)}
    assert all(rank.moved for rank in found)
    # 1,018 chunks of 126 rows make the embedding: the last ranks have none of it
    assert found[0].numel > found[-1].numel > 0
