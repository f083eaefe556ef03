"""Promise 6 for FSDP1: torch's state-dict functions and FSDP's own, full and sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from layouts import OPTIONS, SHAPES, relative_error, train, weights
from ranks import run_ranks
from resuming import build, go_on, load_full, save_full, write
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from amsf_dist import AMSF

SHAPE, NOISE = "uneven", "k_proj.bias"
VOCAB = SHAPES[SHAPE].vocab

# No offloading: on a CPU it copies nothing, and all moments of a tensor become the last gathered.
FULL = (
    StateDictType.FULL_STATE_DICT,
    FullStateDictConfig(offload_to_cpu=False, rank0_only=False),
    FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=False),
)
SHARDED = (
    StateDictType.SHARDED_STATE_DICT,
    ShardedStateDictConfig(offload_to_cpu=False),
    ShardedOptimStateDictConfig(offload_to_cpu=False),
)


def state_dicts(how: str, model: nn.Module, optimizer: AMSF) -> dict[str, Any]:
    if how == "torch, sharded":
        optim = get_optimizer_state_dict(model, optimizer)
        return {"model": get_model_state_dict(model), "optim": optim}
    with FSDP.state_dict_type(model, *(FULL if how == "FSDP, full" else SHARDED)):
        return {"model": model.state_dict(), "optim": FSDP.optim_state_dict(model, optimizer)}


def save(how: str, path: str, model: nn.Module, optimizer: AMSF) -> None:
    if how == "torch, full":
        save_full(path, model, optimizer)
    elif how == "FSDP, full":
        write(path, state_dicts(how, model, optimizer))
    else:
        dcp.save(state_dicts(how, model, optimizer), checkpoint_id=path)


def load(how: str, path: str, model: nn.Module, optimizer: AMSF) -> None:
    if how == "torch, full":
        return load_full(path, model, optimizer)
    if how == "FSDP, full":
        loaded = torch.load(path, weights_only=True)
    else:
        loaded = state_dicts(how, model, optimizer)
        dcp.load(loaded, checkpoint_id=path)
    if how == "torch, sharded":
        set_model_state_dict(model, loaded["model"])
        return set_optimizer_state_dict(model, optimizer, loaded["optim"])
    with FSDP.state_dict_type(model, *(FULL if how == "FSDP, full" else SHARDED)):
        model.load_state_dict(loaded["model"])
        ours = FSDP.optim_state_dict_to_load(model, optimizer, loaded["optim"])
        optimizer.load_state_dict(ours)


def interrupted(
    how: str, layout: str, mode: str, path: str, blocks: str = "adam_mini"
) -> dict[str, Tensor]:
    """Three steps, a checkpoint, and the nine steps that the others must find too."""
    _, model, optimizer = build(layout, SHAPE, resumed=False, blocks=blocks)
    train(model, optimizer, VOCAB, range(3))
    if mode == "eval":
        optimizer.eval()
    save(how, path, model, optimizer)
    optimizer.train()
    train(model, optimizer, VOCAB, range(3, 12))
    return weights(model, optimizer)


def resumed(
    how: str,
    layout: str,
    mode: str,
    path: str,
    steps: range,
    to: str | None = None,
    blocks: str = "adam_mini",
) -> dict[str, Tensor]:
    _, model, optimizer = build(layout, SHAPE, resumed=True, blocks=blocks)
    if mode == "eval":
        optimizer.eval()  # dcp.load fills what is there: else it would leave out the exact y
    load(how, path, model, optimizer)
    go_on(optimizer, mode)
    train(model, optimizer, VOCAB, steps)
    if mode == "eval":
        optimizer.eval()
    if to is not None:
        save(how, to, model, optimizer)
    optimizer.train()
    return weights(model, optimizer)


def resumed_alone(path: str, mode: str, steps: range) -> dict[str, Tensor]:
    """In one process without any wrapper; a folder is first made a file."""
    if Path(path).is_dir():
        dcp_to_torch_save(path, f"{path}.pt")
        path = f"{path}.pt"
    _, model, optimizer = build("single", SHAPE, resumed=True)
    load_full(path, model, optimizer)
    go_on(optimizer, mode)
    train(model, optimizer, VOCAB, steps)
    return weights(model)


HOW = [
    ("torch, sharded", "train"),
    ("torch, full", "eval"),
    ("FSDP, sharded", "eval"),
    ("FSDP, full", "train"),
]


@pytest.mark.parametrize("kind", ["original", "flat"])
@pytest.mark.parametrize(("how", "mode"), HOW)
def test_a_run_goes_on_from_two_ranks_to_four_to_three_to_one(
    tmp_path: Path, how: str, mode: str, kind: str
) -> None:
    layout = f"fsdp1 {'on a mesh' if 'sharded' in how else 'FULL_SHARD'} {kind}"
    paths = [str(tmp_path / name) for name in ("two", "four", "three")]
    expected = run_ranks(2, interrupted, how, layout, mode, paths[0])[0]
    again = run_ranks(2, resumed, how, layout, mode, paths[0], range(3, 12))[0]
    assert all(torch.equal(again[name], expected[name]) for name in expected)

    run_ranks(4, resumed, how, layout, mode, paths[0], range(3, 6), paths[1])
    run_ranks(3, resumed, how, layout, mode, paths[1], range(6, 9), paths[2])
    ends = {
        "in FSDP1": run_ranks(1, resumed, how, layout, mode, paths[2], range(9, 12))[0],
        "alone": run_ranks(1, resumed_alone, paths[2], mode, range(9, 12))[0],
    }
    for end, values in ends.items():
        error, name = relative_error(values, expected, NOISE)
        assert error <= 1e-5, f"one process {end}: {name} differs by {error:.1e}"


@pytest.mark.parametrize("kind", ["original", "flat"])
def test_rows_and_columns_go_on_under_fsdp1(tmp_path: Path, kind: str) -> None:
    layout, path = f"fsdp1 on a mesh {kind}", str(tmp_path / "saved")
    setting = ("torch, sharded", layout, "train", path)
    expected = run_ranks(2, interrupted, *setting, "factored")[0]
    for world_size in (2, 3):
        ours = run_ranks(world_size, resumed, *setting, range(3, 12), None, "factored")[0]
        error, name = relative_error(ours, expected, NOISE)
        assert error <= (0.0 if world_size == 2 else 1e-5), f"{name} differs by {error:.1e}"


STRATEGIES = [
    (f"fsdp1 {strategy} {kind}", world_size)
    for strategy, world_size in (("SHARD_GRAD_OP", 3), ("NO_SHARD", 2), ("HYBRID_SHARD", 4))
    for kind in ("original", "flat")
]


@pytest.mark.parametrize(("layout", "world_size"), STRATEGIES)
def test_every_strategy_resumes_bit_for_bit(tmp_path: Path, layout: str, world_size: int) -> None:
    setting = ("torch, full", layout, "eval", str(tmp_path / "full"))
    expected = run_ranks(world_size, interrupted, *setting)[0]
    again = run_ranks(world_size, resumed, *setting, range(3, 12))[0]
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def own_state_dict(layout: str) -> bool:
    """Without any function of torch's around it: every rank keeps its own."""
    _, model, optimizer = build(layout, SHAPE, resumed=False)
    train(model, optimizer, VOCAB, range(3))
    kept = [param.detach().clone() for param in model.parameters()], optimizer.state_dict()
    _, other, resuming = build(layout, SHAPE, resumed=True)
    with torch.no_grad():
        for param, value in zip(other.parameters(), kept[0], strict=True):
            param.copy_(value)
    resuming.load_state_dict(kept[1])
    for one, its in ((model, optimizer), (other, resuming)):
        train(one, its, VOCAB, range(3, 8))
    ours, theirs = weights(other, resuming), weights(model, optimizer)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", ["original", "flat"])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "NO_SHARD"])
def test_a_rank_takes_back_its_own_state_dict(strategy: str, kind: str) -> None:
    assert run_ranks(2, own_state_dict, f"fsdp1 {strategy} {kind}") == [True, True]


def last_parameters_first(path: str) -> dict[str, Tensor]:
    _, model, _ = build("single", SHAPE, resumed=False)
    named = list(model.named_parameters())[::-1]
    optimizer = AMSF(named, blocks="adam_mini", head_dim=SHAPES[SHAPE].head_dim, **OPTIONS)
    train(model, optimizer, VOCAB, range(3))
    save_full(path, model, optimizer)
    train(model, optimizer, VOCAB, range(3, 8))
    return weights(model)


@pytest.mark.parametrize("kind", ["original", "flat"])
def test_parameters_saved_in_another_order_get_their_own_state(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / "full.pt")
    expected = last_parameters_first(path)
    layout = f"fsdp1 FULL_SHARD {kind}"
    ours = run_ranks(2, resumed, "torch, full", layout, "train", path, range(3, 8))[0]
    error, name = relative_error(ours, expected, NOISE)
    assert error <= 1e-5, f"{name} differs by {error:.1e}"
