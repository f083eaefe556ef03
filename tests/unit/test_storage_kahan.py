"""Kahan compensation: its promise over every weight, and beside torch-optimi's."""

from __future__ import annotations

from functools import cache

import optimi
import pytest
import torch
from torch import Tensor

from amsf_dist.storage import weight_storage
from amsf_dist.storage.kahan import Kahan
from amsf_dist.storage.plain import Plain

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
EVERYTHING = slice(None)


@cache
def numbers() -> Tensor:
    """fp32: each top half with some low halves."""
    halves = [
        0,
        1,
        0x7F,
        0x80,
        0xFF,
        0x100,
        0x801,
        0xFFF,
        0x1000,
        0x1001,
        0x4040,
        0x5A5A,
        0x7FFF,
        0x8000,
    ]
    halves += [0x8001, 0x8080, 0xC000, 0xD555, 0xFFFF]
    patterns = torch.arange(-(2**15), 2**15).view(-1, 1) * 2**16 + torch.tensor(halves)
    return patterns.view(-1).to(torch.int32).view(torch.float32)


def through(storage: Kahan, values: Tensor) -> tuple[Tensor, Tensor]:
    """Weight, and what is read back."""
    memory = tuple(storage.allocate("w", torch.empty_like(values)).values())
    storage.store(memory, EVERYTHING, values)
    return memory[0], storage.load(memory, EVERYTHING, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "least", "relative", "absolute"),
    [
        (torch.bfloat16, 2.0**-117, 2.0**-17, 2.0**-134),
        (torch.float16, 0.25, 2.0**-23, 2.0**-25),
    ],
    ids=["bf16", "fp16"],
)
def test_the_error_is_bounded_as_promised(
    dtype: torch.dtype, least: float, relative: float, absolute: float
) -> None:
    values = numbers()
    weight, read = through(Kahan(dtype), values)
    inside = weight.isfinite()
    off, size = (read.double() - values.double()).abs(), values.double().abs()
    large, small = inside & (size >= least), inside & (size < least)
    assert int(large.sum()) > 10**4 and int(small.sum()) > 10**4
    assert bool((off[large] <= relative * size[large]).all())
    assert bool((off[small] <= absolute).all())
    assert float((off[large] / size[large]).max()) > 0.9 * relative  # and not by chance


@DTYPES
def test_the_weight_is_the_cast(dtype: torch.dtype) -> None:
    weight, read = through(Kahan(dtype), numbers())
    cast = numbers().to(dtype)
    nan = cast.isnan()
    assert torch.equal(weight.view(torch.int16)[~nan], cast.view(torch.int16)[~nan])
    assert bool(weight[nan].isnan().all()) and bool(read[nan].isnan().all())
    infinite = cast.isinf()
    assert torch.equal(read[infinite], cast[infinite].float())


@DTYPES
def test_numbers_of_the_dtype_read_back_bit_for_bit(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    values = values[~values.isnan()]
    _, read = through(Kahan(dtype), values)
    assert torch.equal(read.view(torch.int32), values.view(torch.int32))


@DTYPES
def test_order_is_kept(dtype: torch.dtype) -> None:
    _, read = through(Kahan(dtype), numbers()[~numbers().isnan()].sort().values)
    assert bool((read[1:] >= read[:-1]).all())


def updates_of_optimi(grad: Tensor, eps: float, lr: float) -> Tensor:
    """What optimi's AdamW with betas (0, 0) subtracts, before it rounds it again; fp64."""
    return lr * grad.double() / grad.square().sqrt_().add_(eps).double()


@DTYPES
@pytest.mark.parametrize("lr", [1e-5, 1e-4, 1e-3])
def test_sums_as_exactly_as_optimi(dtype: torch.dtype, lr: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4000, generator=generator).to(dtype)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = optimi.AdamW(
        [theirs], lr=lr, betas=(0.0, 0.0), eps=0.25, weight_decay=0.0, kahan_sum=True, foreach=False
    )
    kahan = Kahan(dtype)
    ours, rounded, fp32 = (
        (start.clone(), torch.zeros_like(start)),
        (start.clone(),),
        (start.float(),),
    )
    kept = ((kahan, ours), (Plain(dtype), rounded), (Plain(torch.float32), fp32))
    exact = start.double()
    for _ in range(300):
        # a drift, so that lost updates add up
        grad = (torch.randn(4000, generator=generator) + 0.5).to(dtype)
        update = updates_of_optimi(grad, 0.25, lr)
        theirs.grad = grad.clone()
        optimizer.step()
        for storage, memory in kept:
            before = storage.load(memory, EVERYTHING, torch.float32)
            storage.store(memory, EVERYTHING, before - update.float())
        exact = exact - update
    read = kahan.load(ours, EVERYTHING, torch.float64)
    read_theirs = theirs.detach().double() + optimizer.state[theirs]["kahan_comp"].double()
    off, off_theirs, off_plain, off_fp32 = (
        float((values.double() - exact).abs().mean())
        for values in (read, read_theirs, rounded[0], fp32[0])
    )
    assert off <= 1.05 * off_theirs + off_fp32  # a compensation is not exacter than its dtype
    assert off < 0.05 * off_plain


def test_weight_decay_goes_into_the_sum() -> None:
    """Decay of 1e-4 a step: rounded away by a bf16 product, kept by the compensated sum."""
    start = torch.randn(4000, generator=torch.Generator().manual_seed(0)).bfloat16()
    theirs = torch.nn.Parameter(start.clone())
    optimizer = optimi.AdamW([theirs], lr=1e-2, weight_decay=1e-2, kahan_sum=True)
    kahan, ours = Kahan(torch.bfloat16), (start.clone(), torch.zeros_like(start))
    for _ in range(500):
        theirs.grad = torch.zeros_like(theirs)
        optimizer.step()
        before = kahan.load(ours, EVERYTHING, torch.float32)
        kahan.store(ours, EVERYTHING, before - 1e-2 * 1e-2 * before)
    assert torch.equal(theirs.detach(), start)
    read = kahan.load(ours, EVERYTHING, torch.float64)
    assert torch.allclose(read, start.double() * (1.0 - 1e-4) ** 500, rtol=2e-3, atol=0.0)


def test_names() -> None:
    storage = weight_storage("kahan", torch.float16)
    assert storage == Kahan(torch.float16)
    assert storage.keys("weight") == ("weight", "weight_compensation")
    assert tuple(storage.allocate("weight", torch.empty(2))) == storage.keys("weight")
    assert tuple(storage.beside("weight", torch.empty(2))) == storage.keys("weight")[1:]
