"""Weights that lie transposed in memory (GPT-2's Conv1D) in flat slices: FSDP1 and ZeRO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from clipping import clip_
from layouts import LAYOUTS, OPTIONS, relative_error
from layouts import moments as plain_moments
from layouts import weights as plain_weights
from models import batch
from ranks import run_ranks
from torch import nn
from zero import CLIP, config, engine_of, everything

from amsf_dist import AMSF

STEPS = 6
SETTINGS = {**OPTIONS, "eps": 1e-5}  # key biases have no true gradient


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_embd": 12, "n_head": 3, "n_layer": 1, "n_positions": 16, "vocab_size": 23}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**shape, **drop))


def loss_of(model: nn.Module, step: int, rank: int = 0, world_size: int = 1) -> torch.Tensor:
    tokens = batch(step, 23, size=12).chunk(world_size)[rank]
    logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def trained(blocks: str, wrap: Callable[[Any], nn.Module] | None = None) -> dict[str, Any]:
    model = gpt2() if wrap is None else wrap(gpt2())
    optimizer = AMSF(model, blocks=blocks, **SETTINGS)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if wrap else (0, 1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, rank, world_size).backward()
        clip_(model, CLIP)
        optimizer.step()
    kind = "row" if blocks == "auto" else blocks
    assert any(row.kind == kind and "c_fc" in row.name for row in optimizer.explain().rows)
    found = {"y": plain_weights(model, optimizer), "v": plain_moments(model, optimizer)}
    with optimizer.averaged_parameters():
        found["x"] = plain_weights(model, optimizer)
    return found


def under_fsdp1(blocks: str) -> Any:
    return {
        name: trained(blocks, LAYOUTS[name].wrap)
        for name in ("fsdp1 FULL_SHARD original", "fsdp1 FULL_SHARD flat")
    }


def under_zero(blocks: str) -> Any:
    found = {}
    for name, settings in {
        "1": {"stage": 1},
        "2": {"stage": 2},
        "3": {"stage": 3, "zero": {"sub_group_size": 500}},
    }.items():
        engine = engine_of(
            gpt2(), config(**settings, amsf={"head_dim": None, "eps": 1e-5, "blocks": blocks})
        )
        for step in range(STEPS):
            engine.backward(loss_of(engine, step, dist.get_rank(), dist.get_world_size()))
            engine.step()
        found[name] = everything(engine)
        engine.destroy()
    return found


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("under", [under_fsdp1, under_zero], ids=["fsdp1", "zero"])
@pytest.mark.parametrize("blocks", ["auto", "factored"])
def test_transposed_weights(under: Callable[..., Any], world_size: int, blocks: str) -> None:
    one_process = trained(blocks)
    for found in run_ranks(world_size, under, blocks):
        for name, values in found.items():
            for what, value in one_process.items():
                error, where = relative_error(values[what], value)
                assert error <= 1e-5, f"{name}: {what} of {where}: {error:.1e}"
