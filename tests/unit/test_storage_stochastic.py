"""Rounding at random: exact in the mean over all random bits, and nothing else moves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from amsf_dist.storage import state_storage, weight_storage
from amsf_dist.storage.noise import bits
from amsf_dist.storage.plain import Plain
from amsf_dist.storage.split import Split
from amsf_dist.storage.stochastic import Stochastic, round_at_random
from amsf_dist.storage.wide import LOW_BITS

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
EVERYTHING = slice(None)


def every_number(dtype: torch.dtype) -> Tensor:
    """[2**16] infinities and NaN too."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def every_draw(dtype: torch.dtype) -> Tensor:
    """All bits that count, with others above them that must not."""
    count = 1 << LOW_BITS[dtype]
    return torch.arange(count, dtype=torch.int32) | 0x5A5 << 20


def some_numbers(dtype: torch.dtype) -> Tensor:
    """fp32, of all sizes that the dtype has, both signs, with mantissas of all lengths."""
    largest, least = (126, -133) if dtype == torch.bfloat16 else (14, -24)
    mantissas = torch.tensor([1.0, 1.0 + 2**-23, 1.1, 1.5, math.pi / 2, 1.75 + 2**-12, 2 - 2**-23])
    exponents = range(largest, least - 3, -(3 if largest == 14 else 21))
    values = torch.cat([mantissas * 2.0**exponent for exponent in exponents])
    return torch.cat([values, -values])


@DTYPES
def test_the_mean_over_all_bits_is_the_value(dtype: torch.dtype) -> None:
    values, draws = some_numbers(dtype), every_draw(dtype)
    for value in values:
        rounded = round_at_random(value.expand(len(draws)), dtype, draws).double()
        mean = rounded.mean()  # of two numbers with few bits: exact in fp64
        assert rounded.unique().numel() <= 2
        if dtype == torch.float16 and abs(value) < 2.0**-14:
            assert abs(mean - value.double()) <= 2.0**-38
        else:
            assert mean == value.double()


@DTYPES
def test_both_neighbours_and_no_others(dtype: torch.dtype) -> None:
    values = some_numbers(dtype)
    digits, smallest = (8, 2.0**-133) if dtype == torch.bfloat16 else (11, 2.0**-24)
    power = values.double() / torch.frexp(values.double()).mantissa
    unit = (power.abs() * 2.0**-digits).clamp(min=smallest)
    for draw in (0, 1, (1 << LOW_BITS[dtype]) - 1, -1):
        noise = torch.full_like(values, draw, dtype=torch.int32)
        rounded = round_at_random(values, dtype, noise).double()
        assert bool(((rounded - values.double()).abs() < unit).all())


@DTYPES
def test_numbers_of_the_dtype_stay(dtype: torch.dtype) -> None:
    numbers = every_number(dtype)
    nan = numbers.isnan()
    for noise in (
        torch.zeros(2**16, dtype=torch.int32),
        torch.full((2**16,), -1, dtype=torch.int32),
        bits(torch.arange(2**16), 0, 0, 0),
    ):
        rounded = round_at_random(numbers.float(), dtype, noise)
        assert torch.equal(rounded.view(torch.int16)[~nan], numbers.view(torch.int16)[~nan])
        assert bool(rounded[nan].isnan().all())


@DTYPES
def test_order_is_kept_under_equal_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator)
    values = patterns.to(torch.int32).view(torch.float32)
    if dtype == torch.float16:  # most patterns lie outside of its range
        values = torch.cat(
            [values, torch.randn(100_000) * 10.0 ** torch.randint(-8, 5, (100_000,))]
        )
    values = values[~values.isnan()].sort().values
    for draw in (0, 1, 77, 4096, 8191, 40_000, 65_535):
        noise = torch.full_like(values, draw, dtype=torch.int32)
        rounded = round_at_random(values, dtype, noise)
        assert bool((rounded[1:] >= rounded[:-1]).all())


@DTYPES
def test_beyond_the_largest_it_is_the_cast(dtype: torch.dtype) -> None:
    largest = torch.tensor(torch.finfo(dtype).max)
    first = int(largest.view(torch.int32))
    beyond = torch.arange(first, first + 2 ** LOW_BITS[dtype] + 3, 7, dtype=torch.int32)
    values = beyond.view(torch.float32)
    values = torch.cat([values, -values, torch.tensor([torch.inf, -torch.inf, torch.nan])])
    noise = torch.full_like(values, -1, dtype=torch.int32)
    rounded, cast = round_at_random(values, dtype, noise), values.to(dtype)
    assert torch.equal(rounded[:-1], cast[:-1]) and bool(rounded[-1].isnan())
    assert bool(cast[:-1].isfinite().any()) and bool(cast[:-1].isinf().any())


def test_small_updates_arrive_on_average() -> None:
    """A thousandth of bf16's last place at a time: lost by rounding to nearest."""
    storage, count, steps = Stochastic(torch.bfloat16), 10_000, 500
    rounded, plain = (torch.ones(count, dtype=torch.bfloat16) for _ in range(2))
    update, ulp = 1e-5, 2.0**-7
    for step in range(steps):
        for line, draw in (
            (rounded, lambda width, step=step: bits(torch.arange(count), 0, step, 1, width)),
            (plain, None),
        ):
            before = storage.load((line,), EVERYTHING, torch.float32)
            storage.store((line,), EVERYTHING, before + update, draw)
    assert bool((plain == 1.0).all())
    mean = float(rounded.double().mean())
    sigma = (ulp * update * steps / count) ** 0.5  # of a mean of rare jumps of one ulp
    assert abs(mean - (1.0 + update * steps)) < 5 * sigma


@DTYPES
def test_without_a_draw_it_is_plain(dtype: torch.dtype) -> None:
    values = some_numbers(dtype)
    ours, theirs = (torch.empty(len(values), dtype=dtype) for _ in range(2))
    Stochastic(dtype).store((ours,), EVERYTHING, values)
    Plain(dtype).store((theirs,), EVERYTHING, values)
    assert torch.equal(ours, theirs)


def test_plain_asks_for_no_draw() -> None:
    def draw(count: int) -> Tensor:
        raise AssertionError("a draw costs time")

    for name in ("native", "kahan", "bf16+8", "bf16+16"):
        storage = weight_storage(name, torch.bfloat16)
        memory = tuple(storage.allocate("w", torch.empty(3)).values())
        storage.store(memory, EVERYTHING, torch.ones(3), draw)
        assert storage.load(memory, EVERYTHING, torch.float32).tolist() == [1.0, 1.0, 1.0]


def test_names() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert weight_storage("stochastic", dtype) == Stochastic(dtype)
        assert weight_storage("native", dtype) == Plain(dtype)
        assert weight_storage("auto", dtype) == weight_storage("bf16+8", dtype) == Split(dtype, 8)
    for name in ("auto", "native", "kahan", "bf16+8", "bf16+16", "stochastic"):
        for dtype in (torch.float32, torch.float64):
            assert weight_storage(name, dtype) == Plain(dtype)
    storage = state_storage("bf16", torch.float32)
    assert storage == Stochastic(torch.bfloat16)
    assert storage.keys("gap") == ("gap",) and storage.beside("gap", torch.empty(2)) == {}
    assert storage.allocate("gap", torch.empty(2))["gap"].dtype == torch.bfloat16
    assert state_storage("auto", torch.float64) == Plain(torch.float64)
