"""The figures of a step: right on one process, the same under every sharding."""

from __future__ import annotations

from dataclasses import astuple
from functools import cache
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, SHAPES, Layout, single, train
from models import Transformer
from ranks import run_ranks
from schedulefree import AdamWScheduleFree

from amsf_dist import AMSF
from amsf_dist.diagnostics import Figures, StepWatch

OPTIONS = {"lr": 5e-3, "warmup_steps": 5, "r": 1.0}
WATCHED = 6
NOISE = "k_proj.bias"


def watched(layout: str | None, options: dict[str, Any]) -> tuple[Figures, dict[str, Figures]]:
    under = LAYOUTS[layout] if layout else Layout(single, (1,))
    shape = SHAPES["uneven"]
    model = under.wrap(Transformer(shape, dtype=torch.float32))
    optimizer = AMSF(model, **OPTIONS, **options)
    train(model, optimizer, shape.vocab, range(WATCHED))
    watch = StepWatch(optimizer)
    watch.before()
    train(model, optimizer, shape.vocab, range(WATCHED, WATCHED + 1))
    return watch.after(), watch.by_parameter


@cache
def alone(clip: str) -> tuple[Figures, dict[str, Figures]]:
    return run_ranks(1, watched, None, clipping(clip))[0]


def clipping(clip: str) -> dict[str, Any]:
    return {"clip": clip, **({"max_norm": 0.05} if clip == "norm" else {})}


@pytest.mark.parametrize("clip", ["block", "norm"])
@pytest.mark.parametrize(
    ("layout", "ranks"),
    [("ddp", 2), ("fsdp2", 3), ("fsdp2 HSDP", 4), ("fsdp1 FULL_SHARD original", 2)],
)
def test_every_sharding_tells_the_same(layout: str, ranks: int, clip: str) -> None:
    total, by_parameter = alone(clip)
    for ours, theirs in run_ranks(ranks, watched, layout, clipping(clip)):
        assert astuple(ours) == pytest.approx(astuple(total), rel=1e-4, abs=1e-6)
        assert theirs.keys() == by_parameter.keys()
        for name, figures in theirs.items():
            if name.endswith(NOISE):  # its true gradient is zero
                continue
            told = astuple(figures)
            assert told == pytest.approx(astuple(by_parameter[name]), rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("clip", ["block", "norm"])
def test_clipping_is_seen(clip: str) -> None:
    assert 0.0 < alone(clip)[0].clipped <= 1.0
    assert (alone(clip)[0].clipped == 1.0) == (clip == "norm")


def test_the_scalars_are_those_of_schedulefree() -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    optimizer = AMSF([("up_proj.weight", ours)], blocks="element", betas=(0.9, 0.99), **OPTIONS)
    upstream = AdamWScheduleFree([theirs], betas=(0.9, 0.99), **OPTIONS)
    upstream.train()
    for step in range(8):
        for param in (ours, theirs):
            param.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        before = upstream.param_groups[0]["weight_sum"]
        watch = StepWatch(optimizer)
        watch.before()
        optimizer.step()
        upstream.step()
        found = watch.after()
        group = upstream.param_groups[0]
        assert found.lr == pytest.approx(group["scheduled_lr"])
        assert found.ckp1 == pytest.approx(1.0 - before / group["weight_sum"])
    y = theirs.detach().clone()
    upstream.eval()
    distance = float((theirs.detach() - y).square().mean().sqrt())
    assert found.distance == pytest.approx(distance, rel=1e-4)


@pytest.mark.parametrize(
    ("storage", "lr", "expected"),
    [
        ("bf16+16", 1e-6, 0.0),
        ("bf16+8", 1e-6, 1.0),
        ("bf16+8", 1e-3, 0.0),
        ("stochastic", 1e-6, 1.0),
    ],
)
def test_updates_that_are_rounded_away_are_counted(
    storage: str, lr: float, expected: float
) -> None:
    """Steps of about lr from weights of 1, where these storages resolve 1e-7, 1e-5 and 1e-2."""
    param = torch.nn.Parameter(torch.ones(16, 64, dtype=torch.bfloat16))
    optimizer = AMSF([("up_proj.weight", param)], lr=lr, weight_storage=storage, betas=(0.0, 0.9))
    param.grad = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    optimizer.step()  # the first leaves no gap: x is z
    watch = StepWatch(optimizer)
    watch.before()
    optimizer.step()
    assert watch.after().stale == pytest.approx(expected, abs=0.1)


def test_ema_has_no_average_and_a_parameter_without_gradient_stays() -> None:
    named = [(f"{name}_proj.weight", torch.nn.Parameter(torch.ones(4, 4))) for name in ("up", "k")]
    optimizer = AMSF(named, lr=0.1, averaging="ema")
    named[0][1].grad = torch.ones(4, 4)
    watch = StepWatch(optimizer)
    watch.before()
    optimizer.step()
    total = watch.after()
    assert (total.ckp1, total.distance, total.stale, total.clipped) == (0.0, 0.0, 0.0, 0.0)
    assert total.lr == pytest.approx(0.1) and len(watch.by_parameter) == 2
