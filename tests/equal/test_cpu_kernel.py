"""The compiled CPU kernel gives the bits of the reference, whatever is stored how and cut where.

Block sums are added in another order, so most tests here take `deterministic=True`, whose sums are
integers; how close the compiled sums are is a test of its own.
"""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import OPTIONS, SHAPES
from models import Transformer, assert_same_bits
from numbers_of import step_with, whole_numbers
from ranks import run_ranks
from resuming import ENGINES
from torch import Tensor, nn

from amsf_dist import AMSF
from amsf_dist.kernels.choice import AMSF_KERNEL
from amsf_dist.kernels.native import build, launch
from amsf_dist.kernels.native.build import library

RULES = ("schedule_free", "ema")
BLOCKS = ("row", "element", "tensor", "factored", "adam_mini")
WEIGHTS: list[tuple[torch.dtype, str]] = [
    (torch.float32, "native"),
    *itertools.product(
        (torch.bfloat16, torch.float16), ("native", "kahan", "bf16+8", "bf16+16", "stochastic")
    ),
]
STATES = ("fp32", "bf16", "int8")
# rows longer and shorter than a vector, a batch and a group, and none of them a multiple
ODD: dict[str, tuple[int, ...]] = {
    "q_proj.weight": (14, 61),
    "long.weight": (3, 701),
    "conv.weight": (6, 5, 3, 3),
    "norm.weight": (77,),
    "one.weight": (1, 1),
}


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    assert library() is not None, "these tests need a C++ compiler (g++)"
    yield


class Odd(nn.Module):
    def __init__(self, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]] = ODD) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator) * 0.1
            self.register_parameter(name.replace(".", "_"), nn.Parameter(values.to(dtype)))


def trained(monkeypatch: pytest.MonkeyPatch, kernel: str, model: nn.Module, **options: Any) -> Any:
    monkeypatch.setenv(AMSF_KERNEL, kernel)
    options = {"lr": 0.02, "weight_decay": 0.1, "deterministic": True, "head_dim": 7, **options}
    optimizer = AMSF(list(model.named_parameters()), **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator) * 0.1
            param.grad = grad.to(param.dtype).to(memory_format=_format_of(param))
        optimizer.step()
    state = optimizer.state_dict()["state"]
    numbers = {name: param.detach().clone() for name, param in model.named_parameters()}
    for index, entries in state.items():
        numbers |= {f"{index} {k}": v for k, v in entries.items() if isinstance(v, Tensor)}
    return numbers


def _format_of(param: Tensor) -> torch.memory_format:
    last = param.dim() == 4 and param.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def assert_alike(monkeypatch: pytest.MonkeyPatch, make: Any, **options: Any) -> None:
    ours = trained(monkeypatch, "auto", make(), **options)
    theirs = trained(monkeypatch, "reference", make(), **options)
    assert_same_bits(ours, theirs, str(options))


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("averaging", RULES)
def test_every_storage_has_the_bits_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, averaging: str, blocks: str
) -> None:
    for (dtype, weights), state in itertools.product(WEIGHTS, STATES):
        assert_alike(
            monkeypatch,
            lambda dtype=dtype: Odd(dtype),
            averaging=averaging,
            blocks=blocks,
            weight_storage=weights,
            state_storage=state,
        )


@pytest.mark.parametrize(
    "options",
    [
        {"clip": "block"},
        {"clip": "block", "blocks": "factored"},
        {"decay": "matrices"},
        {"decouple_lr": True, "warmup_steps": 2, "r": 2.0},
        {"seed": 2**63 + 5, "state_storage": "int8"},
    ],
    ids=str,
)
def test_every_option_has_the_bits_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_alike(monkeypatch, lambda dtype=dtype: Odd(dtype), **options)


@pytest.mark.parametrize("clip", [{"clip": "tensor"}, {"clip": "norm", "max_norm": 0.1}], ids=str)
def test_clipping_by_norms_is_close_to_the_reference(
    monkeypatch: pytest.MonkeyPatch, clip: dict[str, Any]
) -> None:
    options = {**clip, "deterministic": False, "blocks": "auto"}
    ours = trained(monkeypatch, "auto", Odd(torch.float32), **options)
    theirs = trained(monkeypatch, "reference", Odd(torch.float32), **options)
    for name, numbers in ours.items():
        torch.testing.assert_close(numbers, theirs[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("state", STATES)
def test_blocks_longer_than_a_tile(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    shapes = {"long.weight": (2, 70_001), "whole.weight": (3, 40_000)}
    for blocks in ("row", "tensor"):
        make = lambda: Odd(torch.bfloat16, shapes)  # noqa: E731
        assert_alike(monkeypatch, make, state_storage=state, blocks=blocks)


def test_memory_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Module:
        model = Odd(torch.bfloat16)
        model.to(memory_format=torch.channels_last)
        return model

    for state in STATES:
        assert_alike(monkeypatch, make, state_storage=state)


def test_gradients_of_another_dtype_and_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kernel in ("auto", "reference"):
        monkeypatch.setenv(AMSF_KERNEL, kernel)
        param = nn.Parameter(torch.linspace(-1.0, 1.0, 63 * 65).view(63, 65))
        optimizer = AMSF([("w", param)], deterministic=True)
        values = torch.linspace(-3.0, 1.0, 63 * 65).view(65, 63).t()
        for dtype in (torch.float32, torch.bfloat16):
            param.grad = None
            param.grad_dtype = dtype
            param.grad = values.to(dtype)
            assert not param.grad.is_contiguous()
            optimizer.step()
        found.append(param.detach().clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("weights", ["native", "bf16+8", "bf16+16", "stochastic"])
@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_what_is_not_finite_is_stored_alike(
    monkeypatch: pytest.MonkeyPatch, weights: str, state: str, decay: str
) -> None:
    dtype = torch.float32 if weights == "native" else torch.bfloat16
    found = []
    for kernel in ("auto", "reference"):
        monkeypatch.setenv(AMSF_KERNEL, kernel)
        param = nn.Parameter(torch.ones(1800, dtype=dtype))
        param.data[607], param.data[1270] = torch.inf, torch.nan
        optimizer = AMSF(
            [("w", param)],
            weight_decay=0.1,
            decay=decay,
            blocks="tensor",
            weight_storage=weights,
            state_storage=state,
        )
        grad = torch.ones(3, 600, dtype=dtype)
        grad[:, 100:200], grad[:, 200:300] = 0.0, -0.0
        for _ in range(2):  # the second one reads the gap that the first one stored
            param.grad = grad.flatten()
            optimizer.step()
        with optimizer.averaged_parameters():
            found.append(param.detach().clone())
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0, equal_nan=True)
    # decay takes it into the gap, where in 8 bits it is that of all numbers of its scale
    spoilt = 2 * 64 if state == "int8" and decay == "all" else 2
    assert found[0].isfinite().sum() == 1800 - spoilt


@pytest.mark.parametrize("blocks", ["row", "tensor", "factored", "element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_those_of_fp64(dtype: torch.dtype, blocks: str) -> None:
    model = Odd(dtype, {**ODD, "long.weight": (2, 70_001)})
    optimizer = AMSF(list(model.named_parameters()), blocks=blocks, head_dim=7)
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    holdings = optimizer.holdings
    launch.Table(holdings).measure()
    for holding in holdings:
        squares = holding.param.grad.double().square()  # type: ignore[union-attr]
        flat = squares.view(len(squares), -1) if squares.dim() > 1 else squares.view(1, -1)
        for partition in holding.partitions:
            kind = partition.layout.pieces[0].part.blocks
            expected = flat.sum(0) if kind.kind == "column" else None
            if expected is None:
                expected = squares.view(-1, kind.block_numel).sum(1)
            if kind.kind == "element":
                expected = squares.sum().view(1)
            torch.testing.assert_close(partition.sums.double(), expected, rtol=1e-6, atol=0.0)


def test_any_number_of_threads_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    before, found = torch.get_num_threads(), []
    shapes = {"long.weight": (2, 70_001), "many.weight": (300, 301)}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for blocks in ("tensor", "factored"):
                options: dict[str, Any] = {"deterministic": False, "blocks": blocks}
                made = trained(monkeypatch, "auto", Odd(torch.float32, shapes), **options)
                found.append((blocks, made))
    finally:
        torch.set_num_threads(before)
    for blocks, made in found[2:]:
        assert_same_bits(made, dict(found[:2])[blocks], blocks)


def sharded(layout: str, kernel: str, state: str, blocks: str) -> Any:
    os.environ[AMSF_KERNEL] = kernel
    model = ENGINES[layout].wrap(Transformer(SHAPES["uneven"], dtype=torch.float32, seed=0))
    options = {"deterministic": True, "state_storage": state, "blocks": blocks}
    optimizer = AMSF(model, **{**OPTIONS, **options})
    step_with(optimizer, range(3))
    return {what: whole_numbers(optimizer, what) for what in ("y", "gap")}


@pytest.mark.parametrize(
    ("layout", "state", "blocks"),
    [
        ("fsdp2", "int8", "auto"),
        ("fsdp2 Shard(1)", "int8", "auto"),
        ("fsdp2 Shard(1)", "bf16", "factored"),
        ("fsdp1 FULL_SHARD flat", "int8", "factored"),
        ("fsdp1 FULL_SHARD original", "bf16", "auto"),
    ],
)
def test_shards_have_the_bits_of_the_reference_on_one_process(
    monkeypatch: pytest.MonkeyPatch, layout: str, state: str, blocks: str
) -> None:
    monkeypatch.setenv(AMSF_KERNEL, "auto")  # so that it is put back
    alone = sharded("single", "reference", state, blocks)
    for found in run_ranks(3, sharded, layout, "auto", state, blocks):
        assert_same_bits(found, alone, layout)


def test_many_shapes_are_one_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(build, "_compile", refuse)
    for rows, columns in itertools.product((1, 2, 17), (1, 63, 64, 300)):
        trained(monkeypatch, "auto", Odd(torch.bfloat16, {"w.weight": (rows, columns)}))


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_without_a_compiler_it_steps_all_the_same_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    compiler: str,
) -> None:
    expected = trained(monkeypatch, "reference", Odd(torch.bfloat16))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv(build.CACHE, str(tmp_path))
    library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="amsf_dist"):
            found = [trained(monkeypatch, "auto", Odd(torch.bfloat16)) for _ in range(2)]
    finally:
        library.cache_clear()
    for one in found:
        assert_same_bits(one, expected)
    (record,) = caplog.records
    assert "no compiled CPU kernel" in record.message and compiler in record.message


def test_processes_that_start_at_once_compile_once(tmp_path: Path) -> None:
    program = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from amsf_dist.kernels.native import build\n"
        "compiles, real = [], build._compile\n"
        "build._compile = lambda *a: (compiles.append(a[-1].name), real(*a))\n"
        "assert build.library() is not None; print(*compiles)"
    )
    environment = {**os.environ, build.CACHE: str(tmp_path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    compiled = " ".join(said).split()  # clang's library is linked twice: with its own OpenMP
    assert len(compiled) == len(set(compiled)) == len(list(tmp_path.glob("*.so")))
