"""Promise 6: a resumed run is the uninterrupted one, also elsewhere: ranks, engine, mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layouts import LAYOUTS, OPTIONS, SHAPES, Layout, relative_error, single, train, weights
from models import Transformer
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from amsf_dist import AMSF
from amsf_dist.conversion import convert_state_dict

SHAPE, NOISE = "uneven", "k_proj.bias"
VOCAB = SHAPES[SHAPE].vocab
FSDP1 = "fsdp1 FULL_SHARD original"


def build(
    layout: str, lr: float = 5e-3, seed: int = 0, blocks: str = "adam_mini"
) -> tuple[Layout, nn.Module, AMSF]:
    under = LAYOUTS[layout] if layout != "single" else Layout(single, (1,))
    model = under.wrap(Transformer(SHAPES[SHAPE], dtype=torch.float32, seed=seed))
    # other values and another lr: what a resumed run has must come from the checkpoint
    return under, model, AMSF(model, blocks=blocks, **{**OPTIONS, "lr": lr})


def save_sharded(
    folder: str, layout: str, mode: str, flatten: bool, blocks: str = "adam_mini"
) -> Any:
    _, model, optimizer = build(layout, blocks=blocks)
    train(model, optimizer, VOCAB, range(10))
    if mode == "eval":
        optimizer.eval()
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    optim = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"model": get_model_state_dict(model), "optim": optim}, checkpoint_id=folder)
    optimizer.train()
    train(model, optimizer, VOCAB, range(10, 20))
    return weights(model, optimizer)


def load_sharded(
    folder: str, layout: str, mode: str, flatten: bool, blocks: str = "adam_mini"
) -> Any:
    _, model, optimizer = build(layout, lr=0.5, seed=3, blocks=blocks)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    optim = get_optimizer_state_dict(model, optimizer, options=options)
    loaded = {"model": get_model_state_dict(model), "optim": optim}
    dcp.load(loaded, checkpoint_id=folder)
    set_model_state_dict(model, loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optim"], options=options)
    assert optimizer.param_groups[0]["train_mode"] == (mode == "train")
    optimizer.train()
    train(model, optimizer, VOCAB, range(10, 20))
    return weights(model, optimizer)


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_sharded_checkpoint_resumes_on_any_number_of_ranks(
    tmp_path: Path, mode: str, flatten: bool
) -> None:
    setting = (str(tmp_path), "fsdp2", mode, flatten)
    expected = run_ranks(2, save_sharded, *setting)[0]
    for world_size in (4, 3, 1):
        resumed = run_ranks(world_size, load_sharded, *setting)[0]
        error, name = relative_error(resumed, expected, NOISE)
        assert error <= 1e-5, f"{world_size} ranks: {name} differs by {error:.1e}"


@pytest.mark.parametrize("blocks", ["adam_mini", "factored"])
def test_a_checkpoint_goes_from_sharding_to_sharding(tmp_path: Path, blocks: str) -> None:
    expected = run_ranks(4, save_sharded, str(tmp_path), "fsdp2 HSDP", "train", False, blocks)[0]
    for layout, world_size in (("fsdp2", 3), ("fsdp2 Shard(1)", 2), ("ddp", 2)):
        setting = (str(tmp_path), layout, "train", False, blocks)
        resumed = run_ranks(world_size, load_sharded, *setting)[0]
        error, name = relative_error(resumed, expected, NOISE)
        assert error <= 1e-5, f"{layout}: {name} differs by {error:.1e}"


def save_full(path: str, layout: str) -> Any:
    _, model, optimizer = build(layout)
    train(model, optimizer, VOCAB, range(10))
    options = StateDictOptions(full_state_dict=True)
    full = (
        {k: v.clone() for k, v in get_model_state_dict(model, options=options).items()},
        get_optimizer_state_dict(model, optimizer, options=options),
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(full, path)
    train(model, optimizer, VOCAB, range(10, 20))
    return weights(model, optimizer)


def load_full(path: str, layout: str) -> Any:
    _, model, optimizer = build(layout, lr=0.5, seed=3)
    full: Any = ({}, {})
    if dist.get_rank() == 0:
        full = torch.load(path, weights_only=True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, full[0], options=options)
    converted = convert_state_dict(full[1], optimizer)
    set_optimizer_state_dict(model, optimizer, converted, options=options)
    train(model, optimizer, VOCAB, range(10, 20))
    return weights(model, optimizer)


ENGINES = [("single", 1), ("ddp", 2), ("fsdp2", 3), (FSDP1, 2)]


@pytest.mark.parametrize(("source", "saving_ranks"), ENGINES)
def test_a_full_state_dict_goes_from_any_engine_to_any_other(
    tmp_path: Path, source: str, saving_ranks: int
) -> None:
    path = str(tmp_path / "full.pt")
    expected = run_ranks(saving_ranks, save_full, path, source)[0]
    for target, world_size in ENGINES:
        resumed = run_ranks(world_size, load_full, path, target)[0]
        error, name = relative_error(resumed, expected, NOISE)
        assert error <= 1e-5, f"{source} -> {target}: {name} differs by {error:.1e}"


def test_a_moment_of_another_shape_is_refused_by_name() -> None:
    _, _, optimizer = build("single")
    name = "model.norm.weight"
    state_dict = {"state": {name: {"exp_avg_sq": torch.zeros(7)}}, "param_groups": []}
    with pytest.raises(ValueError, match=r"model.norm.weight: 'exp_avg_sq' .*\(7,\).*blocks="):
        convert_state_dict(state_dict, optimizer)
