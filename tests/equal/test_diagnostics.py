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
from amsf_dist.diagnostics import Figures, StaleBlocks, StepWatch

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


# --- by block ------------------------------------------------------------------------------------


def by_block(layout: str | None) -> dict[str, StaleBlocks]:
    """Steps of 2e-8 from weights that resolve, by their size, 1e-9 to 1e-8: some are lost."""
    under = LAYOUTS[layout] if layout else Layout(single, (1,))
    shape = SHAPES["uneven"]
    model = under.wrap(Transformer(shape, dtype=torch.float32))
    optimizer = AMSF(model, lr=2e-8, betas=(0.0, 0.9))
    train(model, optimizer, shape.vocab, range(2))
    watch = StepWatch(optimizer)
    watch.before()
    train(model, optimizer, shape.vocab, range(2, 3))
    watch.after()
    return watch.stale_by_block


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [("ddp", 2), ("fsdp2", 3), ("fsdp2 Shard(1)", 4), ("fsdp1 FULL_SHARD original", 2)],
)
def test_blocks_that_are_cut_add_up(layout: str, ranks: int) -> None:
    (expected,) = run_ranks(1, by_block, None)
    assert any(0.1 < blocks.worst < 1.0 for blocks in expected.values())
    for found in run_ranks(ranks, by_block, layout):
        assert found.keys() == expected.keys()
        for name, blocks in found.items():
            if not name.endswith(NOISE):
                assert blocks.sampled == expected[name].sampled, name
                assert blocks.worst == pytest.approx(expected[name].worst, abs=0.11), name
                assert blocks.wholly == pytest.approx(expected[name].wholly, abs=0.05), name


@pytest.mark.parametrize(
    ("shape", "kind", "blocks", "numbers"),
    [
        ((6, 64), "row", range(6), 64),
        ((200, 2000), "row", range(0, 200, 4), 65536 // 50),  # at most 64 blocks
        ((40, 2000), "tensor", range(1), 65536),
        ((40, 2000), "element", range(1), 65536),  # as one block
    ],
)
def test_stale_blocks_are_those_of_a_hand_computation(
    shape: tuple[int, int], kind: str, blocks: range, numbers: int
) -> None:
    """Rows from all large to all small: steps of 1e-6 are lost in numbers of 1, not of 1e-3."""
    rows, columns = shape
    small = torch.arange(columns) * (rows - 1) < torch.arange(rows)[:, None] * columns
    weights = torch.where(small, 1e-3, 1.0).bfloat16()
    param = torch.nn.Parameter(weights)
    optimizer = AMSF(
        [("up_proj.weight", param)],
        lr=1e-6,
        weight_storage="bf16+8",
        betas=(0.0, 0.9),
        blocks=kind,
    )
    param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    optimizer.step()
    (holding,) = optimizer.holdings
    before = [stored.clone() for stored in holding.weight]
    watch = StepWatch(optimizer)
    watch.before()
    optimizer.step()
    watch.after()
    stays = torch.stack([a == b for a, b in zip(before, holding.weight, strict=True)]).all(0)
    cut = stays.reshape(rows if kind == "row" else 1, -1)
    shares = torch.stack([cut[block][:numbers].double().mean() for block in blocks])
    found = watch.stale_by_block["up_proj.weight"]
    assert found == StaleBlocks(
        len(blocks), float((shares == 1).double().mean()), pytest.approx(float(shares.max()))
    )
    assert found.worst == 1.0 if kind == "row" else 0.1 < found.worst < 0.9
    assert 0 < found.wholly < 0.5 if kind == "row" else found.wholly == 0.0


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
