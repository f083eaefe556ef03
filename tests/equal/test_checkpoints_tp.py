"""Promise 6 for tensor parallel, and a run that moves through every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from layouts import SHAPES, relative_error, train, weights
from ranks import run_ranks
from resuming import build, go_on, load_full, save_full
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

SHAPE, NOISE = "even", "k_proj.bias"  # torch's tensor parallel wants widths that divide
VOCAB = SHAPES[SHAPE].vocab
TP, TP_FSDP2 = "tensor parallel", "tensor parallel x fsdp2"


def interrupted(layout: str, mode: str, flatten: bool, folder: str) -> dict[str, Tensor]:
    under, model, optimizer = build(layout, SHAPE, resumed=False)
    train(model, optimizer, VOCAB, range(6), tensor_parallel=under.tensor_parallel)
    if mode == "eval":
        optimizer.eval()
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    optim = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"model": get_model_state_dict(model), "optim": optim}, checkpoint_id=folder)
    optimizer.train()
    train(model, optimizer, VOCAB, range(6, 12), tensor_parallel=under.tensor_parallel)
    return weights(model)


def resumed(layout: str, mode: str, flatten: bool, folder: str) -> dict[str, Tensor]:
    under, model, optimizer = build(layout, SHAPE, resumed=True)
    if mode == "eval":
        optimizer.eval()  # dcp.load fills what is there: else it would leave out the exact y
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    optim = get_optimizer_state_dict(model, optimizer, options=options)
    loaded = {"model": get_model_state_dict(model), "optim": optim}
    dcp.load(loaded, checkpoint_id=folder)
    set_model_state_dict(model, loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optim"], options=options)
    go_on(optimizer, mode)
    train(model, optimizer, VOCAB, range(6, 12), tensor_parallel=under.tensor_parallel)
    return weights(model)


# At six ranks the 20 rows that tensor parallel leaves of the MLP are cut unevenly, 7, 7 and 6.
ELSEWHERE = [(TP, 2), (TP_FSDP2, 4), ("fsdp2", 3), ("single", 1)]
SAVED = [
    # layout, ranks, mode, flattened, layouts and ranks to go on with
    (TP, 2, "eval", False, ELSEWHERE),
    (TP_FSDP2, 4, "train", False, [*ELSEWHERE, (TP_FSDP2, 6)]),
    (TP_FSDP2, 4, "eval", True, ELSEWHERE),
]


@pytest.mark.parametrize(("source", "ranks", "mode", "flatten", "elsewhere"), SAVED)
def test_tensor_parallel_resumes_on_any_mesh_and_without(
    tmp_path: Path, source: str, ranks: int, mode: str, flatten: bool, elsewhere: Any
) -> None:
    setting = (mode, flatten, str(tmp_path))
    expected = run_ranks(ranks, interrupted, source, *setting)[0]
    for target, world_size in elsewhere:
        ours = run_ranks(world_size, resumed, target, *setting)[0]
        error, name = relative_error(ours, expected, NOISE)
        assert error <= 1e-5, f"{target}, {world_size} ranks: {name} differs by {error:.1e}"
        if (target, world_size) == (source, ranks):
            assert all(torch.equal(ours[name], expected[name]) for name in expected)


# torch 2.13 does not find tied weights when it broadcasts them to FSDP1's flat parameters.
UNTIED: Any = {"shape": SHAPE, "tied": False}


def uninterrupted(blocks: str) -> dict[str, Tensor]:
    _, model, optimizer = build("single", resumed=False, blocks=blocks, **UNTIED)
    train(model, optimizer, VOCAB, range(12))
    return weights(model)


def leg(
    layout: str, mode: str, came_from: str | None, goes_to: str, steps: range, blocks: str
) -> dict[str, Tensor]:
    """Three steps of a run under one engine."""
    under, model, optimizer = build(layout, resumed=came_from is not None, blocks=blocks, **UNTIED)
    if came_from is not None:
        load_full(came_from, model, optimizer, broadcast=mode == "train")
        go_on(optimizer, mode)
    train(model, optimizer, VOCAB, steps, tensor_parallel=under.tensor_parallel)
    if mode == "eval":
        optimizer.eval()
    save_full(goes_to, model, optimizer)
    optimizer.train()
    return weights(model, optimizer)


FLAT, ORIGINAL = "fsdp1 FULL_SHARD flat", "fsdp1 FULL_SHARD original"
JOURNEYS = [
    [(FLAT, 2), ("fsdp2", 3), (TP_FSDP2, 4), ("single", 1)],
    [("single", 1), (TP, 2), (ORIGINAL, 3), (FLAT, 2)],
]


MODES = [("train", "adam_mini"), ("eval", "adam_mini"), ("train", "factored")]


@pytest.mark.parametrize(("mode", "blocks"), MODES)
@pytest.mark.parametrize("journey", JOURNEYS, ids=["to one process", "from one process"])
def test_a_run_moves_from_engine_to_engine(
    tmp_path: Path, journey: list[tuple[str, int]], mode: str, blocks: str
) -> None:
    came_from, values = None, {}
    for number, (layout, world_size) in enumerate(journey):
        goes_to = str(tmp_path / f"{number}.pt")
        steps = range(3 * number, 3 * number + 3)
        values = run_ranks(world_size, leg, layout, mode, came_from, goes_to, steps, blocks)[0]
        came_from = goes_to
    error, name = relative_error(values, uninterrupted(blocks), NOISE)
    assert error <= 1e-5, f"{name} differs by {error:.1e}"
