"""AMSF under accelerate, by the files of configs/accelerate: the plain loop's weights, and resume."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerated import accelerated
from layouts import OPTIONS, SHAPES, loss_of, relative_error
from models import Transformer, assert_same_bits
from ranks import run_ranks
from torch import Tensor

from amsf_dist import AMSF
from amsf_dist.doctor.wrapped import whole_weights

SHAPE = SHAPES["uneven"]
MICRO_BATCHES = 2
CLIP = 0.5
STEPS = 8
KINDS = ("ddp", "fsdp2", "zero2", "zero3")
NO_GRADIENT = "k_proj.bias"  # softmax does not see it: its update is rounding noise at full size
EXPORTED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(MICRO_BATCHES),
    "ACCELERATE_GRADIENT_CLIPPING": str(CLIP),
    # accelerate 1.15 cannot send a buffer that is saved, which this model has, to other ranks
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def transformer(seed: int = 0) -> Transformer:
    return Transformer(SHAPE, dtype=torch.float32, seed=seed)


def plain() -> dict[str, dict[str, Tensor]]:
    """One process, whole batches, no accelerate."""
    model = transformer()
    optimizer = AMSF(model, **OPTIONS)
    for step in range(STEPS):
        loss_of(model, SHAPE.vocab, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    at_y = whole_weights(model)
    with optimizer.averaged_parameters():
        return {"y": at_y, "x": whole_weights(model)}


def train(accelerator: Any, model: Any, optimizer: Any, steps: range) -> None:
    """The loop of accelerate's documentation."""
    parts = accelerator.num_processes * MICRO_BATCHES
    for step in steps:
        for micro in range(MICRO_BATCHES):
            part = accelerator.process_index * MICRO_BATCHES + micro
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, SHAPE.vocab, step, part, parts))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()


def both(model: Any, optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """y and x; `eval` and `train` are those of what `prepare` gave back."""
    at_y = whole_weights(model)
    optimizer.eval()
    at_x = whole_weights(model)
    optimizer.train()
    assert_same_bits(whole_weights(model), at_y, "eval and train")
    return {"y": at_y, "x": at_x}


def prepared(accelerator: Any, seed: int = 0, named: bool = False) -> Any:
    model = transformer(seed)
    params = model.named_parameters() if named else model
    options = {**OPTIONS, "head_dim": SHAPE.head_dim} if named else OPTIONS
    return accelerator.prepare(model, AMSF(params, **options))


def trained(kind: str, folder: str) -> Any:
    """Without a stop; and saved at y and at x, loaded over other weights, and trained on."""
    half, place = STEPS // 2, f"{folder}/{kind}"
    with accelerated(kind, **EXPORTED) as accelerator:
        assert accelerator.num_processes == dist.get_world_size() > 1
        model, optimizer = prepared(accelerator)
        train(accelerator, model, optimizer, range(half))
        accelerator.save_state(f"{place} y")
        optimizer.eval()
        accelerator.save_state(f"{place} x")
        optimizer.train()
        train(accelerator, model, optimizer, range(half, STEPS))
        expected = both(model, optimizer)
    for mode in "yx":
        with accelerated(kind, **EXPORTED) as accelerator:
            model, optimizer = prepared(accelerator, seed=1)
            accelerator.load_state(f"{place} {mode}")
            optimizer.train()
            train(accelerator, model, optimizer, range(half, STEPS))
            assert_same_bits(both(model, optimizer), expected, f"{kind}, saved at {mode}")
    return expected


def everywhere(folder: str) -> dict[str, Any]:
    return {kind: trained(kind, folder) for kind in KINDS}


def test_every_config_equals_the_plain_loop_and_resumes(tmp_path: Path) -> None:
    expected = plain()
    assert relative_error(expected["x"], expected["y"])[0] > 1e-3  # the modes can be told apart
    for found in run_ranks(2, everywhere, str(tmp_path)):
        for kind in KINDS:
            for mode in ("y", "x"):
                error, name = relative_error(found[kind][mode], expected[mode], NO_GRADIENT)
                assert error < 1e-5, f"{kind}, {mode}: {name} {error:.2e}"
