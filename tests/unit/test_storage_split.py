"""Error bits: what "bf16+8" and "bf16+16" promise, over every weight and over every residual."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from amsf_dist.storage import weight_storage
from amsf_dist.storage.split import Split
from amsf_dist.storage.wide import LOW_BITS, from_wide, to_wide

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
BITS = pytest.mark.parametrize("bits", [8, 16])
SMALLEST_FP16 = 2.0**-14


def every_weight(dtype: torch.dtype) -> Tensor:
    """[2**16] all numbers of the dtype, infinities and NaN too, as fp32."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()


@cache
def numbers() -> Tensor:
    """fp32 patterns: each top half with some low halves, some top halves with each low half."""
    halves = [0, 1, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0x180, 0xFFF, 0x1000, 0x1001, 0x5A5A]
    halves += [0x7F7F, 0x7F80, 0x7F81, 0x7FFF, 0x8000, 0x8001, 0x8080, 0xFFFF]
    every_top = torch.arange(-(2**15), 2**15).view(-1, 1) * 2**16 + torch.tensor(halves)
    tops = [0, 1, 0x7F, 0x80, 0x2CFF, 0x3380, 0x387F, 0x3880, 0x3F7F, 0x3F80, 0x4049, 0x477F]
    tops += [0x4780, 0x7F7E, 0x7F7F, 0x7F80, 0x7FC0]
    signs = torch.tensor([[0], [-(2**15)]])
    every_low = (torch.tensor(tops) + signs).view(-1, 1) * 2**16 + torch.arange(2**16)
    patterns = torch.cat([every_top.view(-1), every_low.view(-1)]).to(torch.int32)
    return patterns.view(torch.float32)


def through(storage: Split, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, error and what is read back."""
    span = slice(0, len(values))
    like = torch.empty(len(values), dtype=storage.dtype)
    weight, error = storage.allocate("weight", like).values()
    storage.store((weight, error), span, values)
    return weight, error, storage.load((weight, error), span, torch.float32)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Bit for bit; NaN is NaN."""
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan)
    integer = {2: torch.int16, 4: torch.int32}[ours.element_size()]
    assert torch.equal(ours.view(integer)[~nan], theirs.view(integer)[~nan])


def rounded(values: Tensor, digits: int, smallest: float, overflow: float) -> Tensor:
    """To nearest, ties to even, in a float of `digits` binary digits; by fp64, no bit tricks."""
    power = (values.double() / torch.frexp(values.double()).mantissa).nan_to_num(0.0)
    unit = (power * 2.0**-digits).clamp(min=2.0 ** (1 - digits) * smallest)
    result = (values.double() / unit).round() * unit
    result[result.abs() >= overflow] *= torch.inf
    result[values.isinf()] = values.double()[values.isinf()]
    return torch.copysign(result, values.double()).float()


def read_back(storage: Split, values: Tensor) -> Tensor:
    """What is promised."""
    if storage.dtype == torch.bfloat16:
        if storage.bits == 16:
            return values
        return rounded(values, 16, 2.0**-126, 2.0**128)
    values = rounded(values, 24, SMALLEST_FP16, 2.0**16)
    return values if storage.bits == 16 else rounded(values, 19, SMALLEST_FP16, 2.0**16)


@DTYPES
@BITS
def test_numbers_read_back_as_promised(dtype: torch.dtype, bits: int) -> None:
    storage = Split(dtype, bits)
    _, error, read = through(storage, numbers())
    assert error.dtype == {8: torch.int8, 16: torch.int16}[bits]
    assert_same(read, read_back(storage, numbers()))


@pytest.mark.parametrize(
    ("dtype", "bits", "normal", "relative", "absolute"),
    [
        (torch.bfloat16, 8, 2.0**-126, 2.0**-16, 2.0**-142),
        (torch.float16, 8, SMALLEST_FP16, 2.0**-19, 2.0**-33 + 2.0**-38),
        (torch.float16, 16, SMALLEST_FP16, 0.0, 2.0**-38),
    ],
)
def test_the_error_is_bounded_as_promised(
    dtype: torch.dtype, bits: int, normal: float, relative: float, absolute: float
) -> None:
    values = numbers()
    _, _, read = through(Split(dtype, bits), values)
    off, size = (read.double() - values.double()).abs(), values.double().abs()
    inside = read.isfinite()
    large = inside & (size >= normal)
    assert bool((off[large] <= relative * size[large]).all())
    assert bool((off[inside & (size < normal)] <= absolute).all())


@DTYPES
@BITS
def test_the_weight_is_nearest_to_what_reads_back(dtype: torch.dtype, bits: int) -> None:
    weight, _, read = through(Split(dtype, bits), numbers())
    cast = read.to(dtype)
    off, by_cast = ((w.double() - read.double()).abs() for w in (weight, cast))
    tie = (weight != cast) & ~read.isnan()
    assert_same(weight[~tie], cast[~tie])
    assert int(tie.sum()) > 1000
    largest = torch.finfo(dtype).max
    overflowing = tie & weight.isinf()
    assert not bool(overflowing.any())  # the largest is odd, a cast's tie goes to infinity too
    assert torch.equal(off[tie], by_cast[tie])
    assert bool((weight[tie].double().abs() > cast[tie].double().abs()).all())
    assert bool(cast[read.abs() > 2 * largest].isinf().all())


@DTYPES
@BITS
def test_what_was_read_is_stored_unchanged(dtype: torch.dtype, bits: int) -> None:
    storage = Split(dtype, bits)
    weight, error, read = through(storage, numbers())
    again, error_again, read_again = through(storage, read)
    assert_same(again, weight)
    assert torch.equal(error_again, error)
    assert_same(read_again, read)


@DTYPES
@BITS
def test_order_is_kept(dtype: torch.dtype, bits: int) -> None:
    values = numbers()[~numbers().isnan()].sort().values
    weight, _, read = through(Split(dtype, bits), values)
    assert bool((read[1:] >= read[:-1]).all())
    assert bool((weight[1:] >= weight[:-1]).all())


@DTYPES
@BITS
def test_a_weight_without_error_is_its_number(dtype: torch.dtype, bits: int) -> None:
    """So that a pretrained weight needs no preparation."""
    storage, values = Split(dtype, bits), every_weight(dtype)
    memory = values.to(dtype), storage.beside("w", values)["w_error"]
    assert_same(storage.load(memory, slice(None), torch.float32), values)
    weight, error, _ = through(storage, values)
    assert_same(weight, values.to(dtype))
    assert not bool(error.any())


@DTYPES
def test_patterns_and_numbers_are_one_to_one(dtype: torch.dtype) -> None:
    low = LOW_BITS[dtype]
    tops = every_weight(dtype)
    tops = tops[tops.isfinite()].to(dtype).view(torch.int16).int()
    for below in (0, 1, (1 << low - 1) - 1, 1 << low - 1, (1 << low) - 1):
        wide = (tops << low) + below
        mask = (1 << low + 16) - 1  # above the sign of an fp16 pattern nothing counts
        assert torch.equal(to_wide(from_wide(wide, dtype), dtype) & mask, wide & mask)


def test_training_with_sixteen_bits_is_training_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(5000, generator=generator).bfloat16().float()
    storage = Split(torch.bfloat16, 16)
    memory = master.bfloat16(), storage.beside("w", master)["w_error"]
    for step in range(200):
        update = torch.randn(5000, generator=generator) * 10.0 ** -(step % 9)
        master = 0.999 * master - update
        before = storage.load(memory, slice(None), torch.float32)
        storage.store(memory, slice(None), 0.999 * before - update)
        assert_same(storage.load(memory, slice(None), torch.float32), master)


@DTYPES
@BITS
def test_only_the_span_is_touched(dtype: torch.dtype, bits: int) -> None:
    storage = Split(dtype, bits)
    weight, error = storage.allocate("w", torch.empty(10)).values()
    storage.store((weight, error), slice(3, 5), torch.tensor([1.2345, -1.2345]))
    assert weight.count_nonzero() == error.count_nonzero() == 2
    read = storage.load((weight, error), slice(2, 6), torch.float32)
    assert read.tolist() == pytest.approx([0.0, 1.2345, -1.2345, 0.0], rel=2.0**-16)


@DTYPES
def test_fp64_numbers_are_rounded_to_fp32_first(dtype: torch.dtype) -> None:
    storage = Split(dtype, 16)
    memory = tuple(storage.allocate("w", torch.empty(1)).values())
    storage.store(memory, slice(None), torch.tensor([1 / 3], dtype=torch.float64))
    read = storage.load(memory, slice(None), torch.float64)
    assert read.dtype == torch.float64
    assert float(read) == float(torch.tensor(1 / 3, dtype=torch.float32))


def test_the_default_dtype_changes_nothing() -> None:
    values = numbers()[:: 1 << 10]
    want = through(Split(torch.float16, 8), values)[2]
    torch.set_default_dtype(torch.float64)
    try:
        read = through(Split(torch.float16, 8), values)[2]
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(read, want)


def test_names() -> None:
    storage = weight_storage("bf16+8", torch.bfloat16)
    assert storage == Split(torch.bfloat16, 8)
    assert storage.keys("weight") == ("weight", "weight_error")
    assert tuple(storage.allocate("weight", torch.empty(2))) == storage.keys("weight")
    assert tuple(storage.beside("weight", torch.empty(2))) == storage.keys("weight")[1:]
    assert weight_storage("bf16+16", torch.float16) == Split(torch.float16, 16)
