"""Promise 4 for lines in groups: the same codes under every sharding, in every checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from layouts import OPTIONS, SHAPES
from models import Transformer, assert_same_bits
from numbers_of import step_with, whole_numbers
from ranks import run_ranks
from resuming import ENGINES, load_full, save_full
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from zero import HEADS, config, engine_of
from zero import train as zero_train

from amsf_dist import AMSF
from amsf_dist.integrations.deepspeed import full_state_dicts

WHAT = ("y", "gap")


def build(layout: str, shape: str, seed: int = 0, **options: Any) -> tuple[nn.Module, AMSF]:
    model = ENGINES[layout].wrap(Transformer(SHAPES[shape], dtype=torch.float32, seed=seed))
    options = {"state_storage": "int8", "deterministic": True, **OPTIONS, **options}
    return model, AMSF(model, **options)


def trained(layout: str, shape: str, averaging: str = "schedule_free", blocks: str = "auto") -> Any:
    _, optimizer = build(layout, shape, averaging=averaging, blocks=blocks)
    step_with(optimizer, range(6))
    line = "gap" if averaging == "schedule_free" else "exp_avg"
    peaks = optimizer._ready().units[0].peaks
    return {what: whole_numbers(optimizer, what) for what in ("y", line)}, peaks.num_collectives


@pytest.mark.parametrize(
    ("layout", "world_size", "shape", "collectives"),
    [
        ("ddp", 2, "uneven", 0),
        ("fsdp2", 2, "even", 1),
        ("fsdp2", 3, "uneven", 1),
        ("fsdp2 Shard(1)", 2, "uneven", 1),
        ("fsdp2 HSDP", 4, "uneven", 1),
        ("tensor parallel x fsdp2", 4, "even", None),  # two meshes, vectors on one of them only
        ("fsdp1 FULL_SHARD flat", 3, "uneven", 1),
        ("fsdp1 FULL_SHARD original", 2, "uneven", 1),
    ],
)
def test_every_sharding_has_the_same_codes(
    layout: str, world_size: int, shape: str, collectives: int | None
) -> None:
    alone, _ = trained("single", shape)
    for found, count in run_ranks(world_size, trained, layout, shape):
        for what in WHAT:
            assert_same_bits(found[what], alone[what], f"{layout}: {what}")
        assert collectives in (None, count)


def test_first_moments_too() -> None:
    alone, _ = trained("single", "uneven", "ema")
    for found, _ in run_ranks(3, trained, "fsdp2", "uneven", "ema"):
        assert_same_bits(found["exp_avg"], alone["exp_avg"])


def test_rows_and_columns_too() -> None:
    alone, _ = trained("single", "uneven", blocks="factored")
    for layout, world_size in (("fsdp2", 3), ("fsdp1 FULL_SHARD flat", 2)):
        setting = (layout, "uneven", "schedule_free", "factored")
        for found, _ in run_ranks(world_size, trained, *setting):
            assert_same_bits(found, alone, layout)


def save(path: str, layout: str) -> Any:
    model, optimizer = build(layout, "uneven")
    step_with(optimizer, range(3))
    save_full(path, model, optimizer)
    at_half = whole_numbers(optimizer, "gap")
    step_with(optimizer, range(3, 6))
    return at_half, {what: whole_numbers(optimizer, what) for what in WHAT}


def load(path: str, layout: str, state_storage: str) -> Any:
    model, optimizer = build(layout, "uneven", seed=3, state_storage=state_storage)
    load_full(path, model, optimizer)
    at_half = whole_numbers(optimizer, "gap")
    step_with(optimizer, range(3, 6))
    return at_half, {what: whole_numbers(optimizer, what) for what in WHAT}


@pytest.mark.parametrize("source", ["fsdp2", "fsdp1 FULL_SHARD flat"])
def test_a_full_state_dict_has_every_code(tmp_path: Path, source: str) -> None:
    path = str(tmp_path / "full.pt")
    at_half, at_end = run_ranks(2, save, path, source)[0]
    for target, world_size in (("single", 1), ("fsdp2", 3), ("fsdp1 FULL_SHARD original", 2)):
        loaded, resumed = run_ranks(world_size, load, path, target, "int8")[0]
        assert_same_bits(loaded, at_half, f"{source} -> {target}")
        for what in WHAT:
            assert_same_bits(resumed[what], at_end[what], f"{source} -> {target}: {what}")
        # and another storage has the same numbers to begin with
        wide, _ = run_ranks(world_size, load, path, target, "fp32")[0]
        assert_same_bits(wide, at_half, f"{source} -> {target} in fp32")


def save_sharded(folder: str) -> Any:
    model, optimizer = build("fsdp2", "uneven")
    step_with(optimizer, range(3))
    optim = get_optimizer_state_dict(model, optimizer)
    dcp.save({"model": get_model_state_dict(model), "optim": optim}, checkpoint_id=folder)
    step_with(optimizer, range(3, 6))
    return {what: whole_numbers(optimizer, what) for what in WHAT}


def load_sharded(folder: str, layout: str) -> Any:
    model, optimizer = build(layout, "uneven", seed=3)
    loaded = {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(loaded, checkpoint_id=folder)
    set_model_state_dict(model, loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optim"])
    step_with(optimizer, range(3, 6))
    return {what: whole_numbers(optimizer, what) for what in WHAT}


def test_a_sharded_checkpoint_has_every_code(tmp_path: Path) -> None:
    at_end = run_ranks(2, save_sharded, str(tmp_path))[0]
    for layout, world_size in (("fsdp2", 2), ("fsdp2", 3), ("fsdp2 Shard(1)", 2), ("ddp", 2)):
        resumed = run_ranks(world_size, load_sharded, str(tmp_path), layout)[0]
        for what in WHAT:
            assert_same_bits(resumed[what], at_end[what], f"{layout}: {what}")


def test_numbers_of_another_storage_become_codes(tmp_path: Path) -> None:
    path = str(tmp_path / "full.pt")
    _, optimizer = build("single", "uneven", state_storage="fp32")
    step_with(optimizer, range(3))
    exact = whole_numbers(optimizer, "gap")
    _, other = build("single", "uneven")
    other.load_state_dict(optimizer.state_dict())
    torch.save(other.state_dict(), path)
    for name, codes in whole_numbers(other, "gap").items():
        error = (codes - exact[name]).square().mean().sqrt() / exact[name].square().mean().sqrt()
        assert error < 0.01, name


def test_memory_is_a_byte_and_a_64th_of_two() -> None:
    model = nn.Linear(256, 128, bias=False)
    optimizer = AMSF(model, state_storage="int8")
    numel = 256 * 128
    assert optimizer.memory()["gap"] == numel + 2 * numel // 64
    (row,) = optimizer.explain().rows
    assert row.state_bytes == numel + 2 * numel // 64 + 4 * 128


def test_codes_whose_scales_have_another_name_are_refused_and_change_nothing() -> None:
    param = nn.Parameter(torch.ones(4, 64))
    optimizer = AMSF([("w", param)], state_storage="int8")
    param.grad = torch.rand(4, 64)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    entries = saved["state"][0]
    entries["gap_scale"] = entries.pop("gap_base")  # as before the code of now
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="'gap' was saved in int8 without.*state_storage='bf16'"):
        optimizer.load_state_dict(saved)
    for key, value in before["state"][0].items():
        assert torch.equal(optimizer.state_dict()["state"][0][key], value)


def replaced(shape: str) -> Any:
    """No block is cut, a gradient is not finite on one rank: what it hits stays as it is."""
    model, optimizer = build("fsdp2", shape, deterministic=False, blocks="row")
    step_with(optimizer, range(3))
    before = whole_numbers(optimizer, "gap")
    for holding in optimizer.holdings:
        holding.param.grad = torch.full_like(holding.param.detach(), torch.inf)
    optimizer.step()
    return before, whole_numbers(optimizer, "gap")


def test_what_is_not_finite_leaves_codes_alone() -> None:
    for before, after in run_ranks(2, replaced, "even"):
        assert_same_bits(after, before)


def save_zero(folder: str) -> Any:
    engine = zero_engine(3, {"sub_group_size": 500})
    zero_train(engine, SHAPES["even"].vocab, range(3))
    engine.save_checkpoint(folder, tag="half")
    at_half = whole_numbers(engine.basic_optimizer, "gap")
    zero_train(engine, SHAPES["even"].vocab, range(3, 5))
    return at_half, whole_numbers(engine.basic_optimizer, "gap")


def load_zero(folder: str, stage: int, options: dict[str, Any]) -> Any:
    engine = zero_engine(stage, options)
    assert engine.load_checkpoint(folder, tag="half")[0] is not None
    at_half = whole_numbers(engine.basic_optimizer, "gap")
    zero_train(engine, SHAPES["even"].vocab, range(3, 5))
    return at_half, whole_numbers(engine.basic_optimizer, "gap")


def zero_engine(stage: int, options: dict[str, Any]) -> Any:
    settings = config(stage=stage, zero=options, amsf={"state_storage": "int8"})
    return engine_of(Transformer(SHAPES["even"], dtype=torch.float32), settings)


def test_under_deepspeed_too(tmp_path: Path) -> None:
    folder = str(tmp_path)
    at_half, at_end = run_ranks(2, save_zero, folder)[0]
    for found, after in run_ranks(2, load_zero, folder, 3, {"sub_group_size": 500}):
        assert_same_bits((found, after), (at_half, at_end))
    for world_size, stage in ((3, 1), (1, 0)):
        for found, _ in run_ranks(world_size, load_zero, folder, stage, {}):
            assert_same_bits(found, at_half, f"stage {stage} on {world_size}")
    weights, state = full_state_dicts(folder, "half")
    model = Transformer(SHAPES["even"], dtype=torch.float32, seed=3)
    optimizer = AMSF(model, state_storage="int8", head_dim=HEADS)
    model.load_state_dict(weights, strict=False)
    optimizer.load_state_dict(state)
    assert_same_bits(whole_numbers(optimizer, "gap"), at_half, "one process")
