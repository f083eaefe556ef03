"""Promise 4 under DeepSpeed: masters of 16 bits with error bits beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import SHAPES
from models import Transformer, assert_same_bits
from ranks import run_ranks
from zero import config, engine_of, everything, train

# Half way between two 16-bit numbers, as one in 2**17 is, error bits count from the upper one, and
# a master's cast takes the even one (docs/storage.md). In these steps there is none.
SHAPE, STEPS, HALF = SHAPES["even"], 7, 4
FP32_MASTERS = {"enabled": True}
SHORT = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
# ZeRO-3's own linear layers round otherwise; clipping would multiply in bf16 and in fp32
STAGE_3 = {"memory_efficient_linear": False}


def engine(stage: int, storage: str, short: bool) -> Any:
    settings = config(
        stage=stage,
        bf16=SHORT if short else FP32_MASTERS,
        zero=STAGE_3 if stage == 3 else {},
        amsf={"weight_storage": storage},
        gradient_clipping=0.0,
    )
    return engine_of(Transformer(SHAPE, dtype=torch.float32), settings)


def run(stages: list[int], short: bool) -> Any:
    found = []
    for stage in stages:
        built = engine(stage, "bf16+16", short)
        train(built, SHAPE.vocab, range(STEPS))
        held = built.basic_optimizer.memory()
        found.append((everything(built), held["weights"], held["error_bits"]))
        built.destroy()
    return found


def test_16_error_bits_are_fp32_masters_at_every_stage() -> None:
    stages = [1, 2, 3]
    for long, short in zip(
        run_ranks(2, run, stages, False)[0], run_ranks(2, run, stages, True)[0], strict=True
    ):
        assert_same_bits(short[0], long[0])
        assert (short[1], short[2]) == (long[1] // 2, long[1] // 2) and long[2] == 0


def save(folder: str, saved: tuple[int, str, bool], mode: str) -> Any:
    built = engine(*saved)
    train(built, SHAPE.vocab, range(HALF))
    if mode == "eval":
        built.optimizer.eval()
    built.save_checkpoint(folder, tag="half")
    built.optimizer.train()
    train(built, SHAPE.vocab, range(HALF, STEPS))
    return everything(built)


def resume(folder: str, under: tuple[int, str, bool]) -> Any:
    built = engine(*under)
    built.load_checkpoint(folder, tag="half")
    built.optimizer.train()
    train(built, SHAPE.vocab, range(HALF, STEPS))
    return everything(built)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("saved", "under"),
    [
        ((1, "bf16+16", True), (3, "bf16+16", False)),  # to fp32 masters
        ((3, "bf16+16", False), (2, "bf16+16", True)),  # and from them
        ((2, "auto", True), (2, "auto", True)),
    ],
)
def test_masters_of_any_kind_load_into_any_other(
    tmp_path: Path, saved: tuple[int, str, bool], under: tuple[int, str, bool], mode: str
) -> None:
    uninterrupted = run_ranks(2, save, str(tmp_path), saved, mode)[0]
    for found in run_ranks(2, resume, str(tmp_path), under):
        assert_same_bits(found, uninterrupted)
