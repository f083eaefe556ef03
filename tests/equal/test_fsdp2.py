"""Promises 2 and 9 for FSDP2: the same update as one process, and the collectives of the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import OPTIONS, SHAPES, STEPS, fsdp2, relative_error, run, train, weights
from models import Transformer
from ranks import run_ranks
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from amsf_dist import AMSF

# Under softmax a key's bias has no true gradient: what arrives is rounding noise, which a division
# by its own size blows up to full steps.
NOISE = "k_proj.bias"


def ranks_hold(shape: str) -> list[int]:
    model = fsdp2(Transformer(SHAPES[shape]))
    return [param.to_local().numel() for param in model.parameters()]


def test_the_uneven_shape_leaves_ranks_without_a_part() -> None:
    per_rank = run_ranks(4, ranks_hold, "uneven")
    assert any(numel == 0 for numel in per_rank[3])
    assert sum(map(sum, per_rank)) == sum(
        p.numel() for p in Transformer(SHAPES["uneven"]).parameters()
    )


CUTS = [
    # ranks, shape, blocks, blocks that are cut
    (2, "even", "auto", 0),  # heads lie whole on their ranks
    (2, "even", "element", 0),
    (3, "uneven", "row", 0),  # Shard(0) never cuts a row
    (4, "even", "auto", 2),  # two key heads of 8 rows, 4 rows a rank
    (3, "uneven", "tensor", 16),  # every parameter is one block
]


def collectives(shape: str, blocks: str) -> Any:
    model = fsdp2(Transformer(SHAPES[shape], dtype=torch.float32))
    optimizer = AMSF(model, blocks=blocks)
    counts = []
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        with CommDebugMode() as comm:
            optimizer.step()
        counts.append({str(op): count for op, count in comm.get_comm_counts().items() if count})
    return counts, optimizer.explain().cut_blocks


@pytest.mark.parametrize(("world_size", "shape", "blocks", "cut"), CUTS)
def test_a_step_has_one_all_reduce_where_blocks_are_cut_and_none_elsewhere(
    world_size: int, shape: str, blocks: str, cut: int
) -> None:
    for counts, cut_blocks in run_ranks(world_size, collectives, shape, blocks):
        assert cut_blocks == cut
        for count in counts:
            assert sum(count.values()) == (1 if cut else 0), count
            assert all("allreduce" in op for op in count), count


def run_mixed(parameter: torch.dtype) -> Any:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = []
    for wrap in (lambda model: fsdp2(model, mp_policy=policy), fsdp2):
        torch.manual_seed(0)
        model = wrap(Transformer(SHAPES["uneven"], dtype=parameter))
        optimizer = AMSF(model, blocks="adam_mini", **OPTIONS)
        train(model, optimizer, SHAPES["uneven"].vocab, range(STEPS))
        states = {
            str(value.dtype) for state in optimizer.state.values() for value in state.values()
        }
        results.append((weights(model), states))
    return results


def test_a_mixed_precision_policy_computes_in_bf16_and_steps_in_fp32() -> None:
    for (mixed, states), (full, _) in run_ranks(2, run_mixed, torch.float32):
        assert states == {"torch.float32", "torch.float64"}  # fp64: the counters
        assert all(value.dtype == torch.float32 for value in mixed.values())
        error, name = relative_error(mixed, full, NOISE)
        assert 0 < error < 0.2, (error, name)  # another rounding of the same training


def run_from_meta(before_weights_exist: bool) -> dict[str, Tensor]:
    source = Transformer(SHAPES["uneven"], dtype=torch.float32)
    with torch.device("meta"):
        model = Transformer(SHAPES["uneven"], dtype=torch.float32)
    model = fsdp2(model)
    optimizer = AMSF(model, blocks="tensor", **OPTIONS) if before_weights_exist else None
    model.to_empty(device="cpu")
    with torch.no_grad():
        for param, value in zip(model.parameters(), source.parameters(), strict=True):
            param.copy_(distribute_tensor(value.detach(), param.device_mesh, param.placements))
        model.temperature.fill_(1.0)
    optimizer = optimizer or AMSF(model, blocks="tensor", **OPTIONS)
    train(model, optimizer, SHAPES["uneven"].vocab, range(STEPS))
    return weights(model)


@pytest.mark.parametrize("before_weights_exist", [False, True])
def test_a_model_from_the_meta_device_trains_alike(before_weights_exist: bool) -> None:
    rule = ("tensor", "schedule_free")
    expected = run(None, "uneven", torch.float32, [rule], 1e9)[rule][0]["y"]
    for ours in run_ranks(3, run_from_meta, before_weights_exist):
        error, name = relative_error(ours, expected, NOISE)
        assert error <= 1e-5, f"{name} differs by {error:.1e}"


def run_by_names() -> Any:
    results = []
    for by_model in (True, False):
        model = fsdp2(Transformer(SHAPES["even"], dtype=torch.float32))
        head = {} if by_model else {"head_dim": 8}
        optimizer = AMSF(model if by_model else model.named_parameters(), **head, **OPTIONS)
        train(model, optimizer, SHAPES["even"].vocab, range(3))
        results.append((weights(model), [row.kind for row in optimizer.explain().rows]))
    return results


def test_named_parameters_taken_after_wrapping_do_as_well_as_the_model() -> None:
    for (by_model, kinds), (by_names, kinds_by_names) in run_ranks(2, run_by_names):
        assert kinds == kinds_by_names and "head" in kinds
        assert all(torch.equal(by_model[name], by_names[name]) for name in by_model)
