"""Promise 6 under DeepSpeed: resume anywhere equals uninterrupted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import OPTIONS, SHAPES, fsdp2, relative_error
from layouts import moments as plain_moments
from layouts import train as train_plain
from layouts import weights as plain_weights
from models import Transformer
from ranks import run_ranks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from zero import CLIP, HEADS, config, counters, engine_of, everything, train

from amsf_dist import AMSF
from amsf_dist.integrations.deepspeed import full_state_dicts, load_state_dict, to_universal

SHAPE = SHAPES["even"]
HALF, STEPS = 4, 8
TOLERANCE = {"y": 1e-5, "x": 1e-5, "v": 1e-6}
NOISE = "k_proj.bias"

SETTINGS: dict[str, dict[str, Any]] = {
    "0": {},
    "1": {"stage": 1},
    "2": {"stage": 2, "zero": {"round_robin_gradients": True}},
    "2 offload": {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}},
    "3": {"stage": 3, "zero": {"sub_group_size": 500}},
    "factored 1": {"stage": 1, "amsf": {"blocks": "factored"}},
    "factored 3": {"stage": 3, "zero": {"sub_group_size": 500}, "amsf": {"blocks": "factored"}},
    "bf16 0": {"bf16": {"enabled": True}},
    "bf16 1": {"stage": 1, "bf16": {"enabled": True}},
    "bf16 wrapper": {
        "stage": 1,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "bf16 3": {"stage": 3, "bf16": {"enabled": True}},
}
FP32 = ("0", "1", "2", "2 offload", "3", "factored 1", "factored 3")
UNIVERSAL = {"checkpoint": {"load_universal": True}}


def blocks_of(name: str) -> str:
    return "factored" if name.startswith("factored") else "auto"


def build(name: str, **changes: Any) -> Any:
    model = Transformer(SHAPE, dtype=torch.float32)
    return engine_of(model, config(**SETTINGS[name], **changes))


def save(folder: str, names: list[str]) -> Any:
    """Half way, in both modes; then uninterrupted to the end."""
    found = {}
    for name in names:
        engine = build(name)
        train(engine, SHAPE.vocab, range(HALF))
        engine.save_checkpoint(folder, tag=f"{name} y", client_state={"mine": 7})
        with engine.optimizer.averaged_parameters():
            engine.save_checkpoint(folder, tag=f"{name} x", client_state={"mine": 7})
        train(engine, SHAPE.vocab, range(HALF, STEPS))
        found[name] = everything(engine)
        engine.destroy()
    return found


def resume(folder: str, pairs: list[tuple[str, str, str]]) -> Any:
    """Load `saved` in the mode `mode` under `name`, and go on to the end."""
    found = {}
    for saved, mode, name in pairs:
        engine = build(name, **(UNIVERSAL if folder.endswith("universal") else {}))
        path, client_state = engine.load_checkpoint(folder, tag=f"{saved} {mode}")
        assert path is not None and client_state["mine"] == 7
        assert engine.global_steps == HALF
        assert counters(engine) == {float(HALF)}
        engine.optimizer.train()
        train(engine, SHAPE.vocab, range(HALF, STEPS))
        found[saved, mode, name] = everything(engine)
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = str(tmp_path_factory.mktemp("saved"))
    return folder, run_ranks(2, save, folder, list(SETTINGS))[0]


def assert_same_run(found: Any, uninterrupted: Any, exact: bool) -> None:
    for (name, mode, under), values in found.items():
        for what, value in values.items():
            error, where = relative_error(value, uninterrupted[name][what], NOISE)
            bound = 0.0 if exact else TOLERANCE[what]
            assert error <= bound, f"{name} {mode} -> {under}: {what} of {where}: {error:.1e}"


@pytest.mark.xdist_group("zero checkpoints")
def test_same_engine_goes_on_bit_for_bit(saved: tuple[str, Any]) -> None:
    folder, uninterrupted = saved
    pairs = [(name, mode, name) for name in SETTINGS for mode in "yx"]
    for found in run_ranks(2, resume, folder, pairs):
        assert_same_run(found, uninterrupted, exact=True)


@pytest.mark.xdist_group("zero checkpoints")
@pytest.mark.parametrize(
    ("world_size", "pairs"),
    [
        (4, [("2", "y", "3"), ("3", "x", "2"), ("0", "y", "3"), ("1", "x", "1")]),
        (
            3,
            [
                ("3", "y", "1"),
                ("2", "x", "3"),
                ("2 offload", "y", "0"),
                ("factored 3", "y", "factored 1"),
            ],
        ),
        (1, [("3", "x", "3"), ("2", "y", "0"), ("0", "x", "2"), ("bf16 1", "y", "bf16 wrapper")]),
        (
            2,
            [
                ("1", "y", "3"),
                ("3", "x", "0"),
                ("0", "x", "2 offload"),
                ("3", "y", "2"),
                ("factored 1", "x", "factored 3"),
            ],
        ),
    ],
)
def test_other_stages_and_ranks(
    saved: tuple[str, Any], world_size: int, pairs: list[tuple[str, str, str]]
) -> None:
    folder, uninterrupted = saved
    for found in run_ranks(world_size, resume, folder, pairs):
        in_fp32 = {key: value for key, value in found.items() if key[0] in FP32}
        assert_same_run(in_fp32, uninterrupted, exact=False)


@pytest.mark.xdist_group("zero checkpoints")
def test_universal(saved: tuple[str, Any], tmp_path: Path) -> None:
    folder, uninterrupted = saved
    universal = tmp_path / "universal"
    for tag in ("2 y", "3 x", "3 y", "factored 3 x"):
        to_universal(folder, universal, tag)
    with pytest.raises(FileExistsError):
        to_universal(folder, universal, "2 y")
    to_three = [("2", "y", "3"), ("3", "x", "1"), ("factored 3", "x", "factored 1")]
    for world_size, pairs in ((3, to_three), (2, [("3", "y", "3")])):
        for found in run_ranks(world_size, resume, str(universal), pairs):
            assert_same_run(found, uninterrupted, exact=False)


def full_to_zero(folder: str, name: str, at: str) -> Any:
    engine = build(name)
    load_state_dict(engine, **torch.load(f"{folder}/{at}.pt", weights_only=False))
    engine.optimizer.train()
    train(engine, SHAPE.vocab, range(HALF, STEPS))
    return {(name, at, name): everything(engine)}


@pytest.mark.xdist_group("zero checkpoints")
def test_one_process_and_back(saved: tuple[str, Any], tmp_path: Path) -> None:
    folder, uninterrupted = saved
    for tag in ("factored 3 y", "3 y", "2 x", "0 y"):
        model = Transformer(SHAPE, dtype=torch.float32)
        optimizer = AMSF(model, blocks=blocks_of(tag), head_dim=HEADS, **OPTIONS)
        weights, state = full_state_dicts(folder, tag)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied
        optimizer.load_state_dict(state)
        for mode in ("y", "x"):
            optimizer.train() if mode == "y" else optimizer.eval()
            ours = {"model_state_dict": model.state_dict(), "state_dict": optimizer.state_dict()}
            torch.save(ours, tmp_path / f"{mode}.pt")
        optimizer.train()
        train_plain(model, optimizer, SHAPE.vocab, range(HALF, STEPS), clip=CLIP)
        found = {"y": plain_weights(model), "v": plain_moments(model, optimizer)}
        with optimizer.averaged_parameters():
            found["x"] = plain_weights(model)
        assert_same_run({(tag[:-2], tag[-1], "one"): found}, uninterrupted, exact=False)
    for world_size, name, mode in ((2, "3", "y"), (3, "2", "x")):
        for found in run_ranks(world_size, full_to_zero, str(tmp_path), name, mode):
            assert_same_run(found, uninterrupted, exact=False)


def zero_to_fsdp2(folder: str, tag: str) -> Any:
    """A DeepSpeed checkpoint into FSDP2, to the end; and what it saves half way."""
    model = fsdp2(Transformer(SHAPE, dtype=torch.float32))
    optimizer = AMSF(model, blocks=blocks_of(tag), head_dim=HEADS, **OPTIONS)
    weights, state = full_state_dicts(folder, tag) if dist.get_rank() == 0 else ({}, {})
    everywhere = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, weights, options=everywhere)
    set_optimizer_state_dict(model, optimizer, state, options=everywhere)
    optimizer.train()
    whole = StateDictOptions(full_state_dict=True)
    middle = copy.deepcopy(  # what is not sharded is the live tensor
        {
            "model_state_dict": get_model_state_dict(model, options=whole),
            "state_dict": get_optimizer_state_dict(model, optimizer, options=whole),
        }
    )
    train_plain(model, optimizer, SHAPE.vocab, range(HALF, STEPS), clip=CLIP)
    found = {"y": plain_weights(model), "v": plain_moments(model, optimizer)}
    with optimizer.averaged_parameters():
        found["x"] = plain_weights(model)
    return {(tag[:-2], tag[-1], "fsdp2"): found}, middle


@pytest.mark.xdist_group("zero checkpoints")
@pytest.mark.parametrize("tag", ["3 y", "2 x", "factored 1 y"])
def test_fsdp2_and_back(saved: tuple[str, Any], tmp_path: Path, tag: str) -> None:
    folder, uninterrupted = saved
    ranks = run_ranks(3, zero_to_fsdp2, folder, tag)
    for found, _ in ranks:
        assert_same_run(found, uninterrupted, exact=False)
    torch.save(ranks[0][1], tmp_path / "fsdp2.pt")
    back = "factored 3" if tag.startswith("factored") else "3"
    for found in run_ranks(2, full_to_zero, str(tmp_path), back, "fsdp2"):
        assert_same_run(found, uninterrupted, exact=False)
