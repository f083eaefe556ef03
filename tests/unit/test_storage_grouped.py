"""Eight bits by groups: every code at all scales, and places between every two codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amsf_dist.storage import Groups, Int8
from amsf_dist.storage.grouped import decode, encode
from amsf_dist.storage.noise import bits

CODES = torch.cat([torch.arange(128), torch.arange(-127, 0)]).to(torch.int8)


def noise(values: Tensor, seed: int = 0) -> Tensor:
    return bits(torch.arange(values.numel()).view(values.shape), seed, 0, 0, 17)


def step_of(values: Tensor, scales: Tensor) -> Tensor:
    """Between the two codes around each number, in fp64: 64 of them to the next power of two."""
    raised = scales.double().unsqueeze(1) + values.double().abs()
    return torch.exp2(raised.log2().floor()) / 64


TOP = torch.tensor([[127]], dtype=torch.int8)


def exactly(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes stand for, step by step from the scale on, in fp64."""
    scale = scales.double().view(-1, 1)
    ends = [scale]
    for _ in range(127):
        ends.append(ends[-1] + torch.exp2(ends[-1].log2().floor()) / 64)
    codes = codes.expand(len(scale), -1)
    found = torch.cat(ends, 1).gather(1, (codes & 127).long()) - scale
    return torch.where(codes < 0, -found, found)


def assert_least(scales: Tensor, absmax: Tensor) -> None:
    """Code 127 reaches the largest number, and does not with the next smaller scale."""
    patterns = scales.view(torch.int16)
    assert bool((patterns % 2 == 0).all())  # 6 bits behind the leading one
    assert bool((exactly(TOP, scales).view(-1) >= absmax.double()).all())
    smaller = exactly(TOP, (patterns - 2).view(torch.bfloat16)).view(-1)
    assert bool(((smaller < absmax.double()) | (scales == 2.0**-100)).all())


def groups(spread: float, kind: str = "normal", size: int = 64, count: int = 2000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, size, generator=generator)
    if kind == "heavy":
        values = values / torch.rand(count, size, generator=generator)
    elif kind == "outlier":
        values[:, 5] *= 1000.0
    elif kind == "sparse":
        values *= torch.rand(count, size, generator=generator) < 0.1
    return values * spread


EVERY_KIND = pytest.mark.parametrize("kind", ["normal", "heavy", "outlier", "sparse"])
EVERY_SPREAD = pytest.mark.parametrize("spread", [1e-40, 1e-36, 1e-9, 1.0, 1e30])


def test_every_code_is_encoded_without_change_at_any_scale() -> None:
    scales = torch.arange(0, 0x7F80, 2, dtype=torch.int16).view(torch.bfloat16)
    scales = scales[(scales >= 2.0**-100) & (exactly(TOP, scales).view(-1) < 2.0**127)]
    scales = scales[::5]  # every exponent, and every mantissa some time
    codes = CODES.expand(len(scales), -1)
    values = decode(codes, scales)
    assert torch.equal(values.double(), exactly(codes, scales))
    assert bool((decode(torch.full_like(codes, -128), scales) == 0).all())
    for drawn in (noise(values), torch.full_like(values, 2**17 - 1, dtype=torch.int32), None):
        again, scales_again = encode(values, drawn)
        assert torch.equal(scales_again, scales)
        assert torch.equal(again, codes)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-20, 1.0, 65 / 64, 1.5, 127 / 64, 2.0**60])
def test_the_mean_over_all_bits_is_the_value(scale: float) -> None:
    """256 places between every two codes, 256 evenly spaced draws."""
    given = torch.tensor([scale], dtype=torch.bfloat16)
    ends = decode(torch.arange(128, dtype=torch.uint8).to(torch.int8).view(1, -1), given)[0].view(
        -1, 1
    )
    values = ends[:-1] + (ends[1:] - ends[:-1]) * torch.arange(256) / 256.0
    values *= torch.where(torch.arange(127) % 3 == 0, -1.0, 1.0).view(-1, 1)
    peaks = ends[-1].expand(127)
    total = torch.zeros(values.shape, dtype=torch.float64)
    for draw in range(256):
        drawn = torch.full(values.shape, draw << 9, dtype=torch.int32)
        codes, scales = encode(values, drawn, peaks)
        assert bool((scales == scale).all())
        total += decode(codes, scales)
    assert torch.equal(total / 256.0, values.double())


@EVERY_KIND
@EVERY_SPREAD
def test_numbers_are_less_than_a_step_away(kind: str, spread: float) -> None:
    values = groups(spread, kind)
    for drawn, share in ((noise(values), 1.0), (None, 0.5)):
        codes, scales = encode(values, drawn)
        off = (decode(codes, scales).double() - values.double()).abs()
        raised = values.double().abs() + scales.double().unsqueeze(1)
        assert bool((off <= share * step_of(values, scales) + 2.0**-24 * raised).all())
        assert bool((step_of(values, scales) <= raised / 64).all())
        assert bool((decode(codes, scales) * values >= 0.0).all())
        assert bool((codes[values == 0.0] == 0).all())


@EVERY_KIND
@EVERY_SPREAD
def test_the_scale_is_the_least_that_serves(kind: str, spread: float) -> None:
    values = groups(spread, kind)
    codes, scales = encode(values, noise(values))
    assert_least(scales, values.abs().amax(1))
    assert bool(((codes & 127).amax(1) >= 125)[scales > 2.0**-100].all())
    assert bool((codes != -128).all())  # one zero is enough


@pytest.mark.parametrize("kind", ["normal", "heavy", "outlier"])
def test_the_mean_over_many_draws_is_the_value(kind: str) -> None:
    values, rounds = groups(1e-4, kind, count=20), 2000
    total, scales = torch.zeros_like(values, dtype=torch.float64), encode(values)[1]
    for seed in range(rounds):
        total += decode(*encode(values, noise(values, seed)))
    sigma = step_of(values, scales) / 2.0 / rounds**0.5  # at most: half way between two codes
    assert bool(((total / rounds - values.double()).abs() < 6.0 * sigma).all())
    off = (total / rounds - values.double()).sum() / sigma.square().sum().sqrt()
    assert abs(float(off)) < 5.0  # no common drift either


def test_order_is_kept_under_equal_bits() -> None:
    values = groups(1.0, "heavy", size=4096, count=20).sort(1).values
    for draw in (0, 1, 12345, 2**15, 2**17 - 1):
        read = decode(*encode(values, torch.full(values.shape, draw, dtype=torch.int32)))
        assert bool((read[:, 1:] >= read[:, :-1]).all())


def test_a_group_of_zeros_is_zero() -> None:
    values = torch.zeros(3, 32)
    values[1] = -0.0
    values[2, 7] = 1e-45  # fp32's smallest
    codes, scales = encode(values, noise(values))
    assert codes.count_nonzero() == 0
    assert scales.tolist() == [2.0**-100] * 3
    codes, scales = torch.zeros(1, 32, dtype=torch.int8), torch.zeros(1, dtype=torch.bfloat16)
    assert decode(codes, scales).count_nonzero() == 0  # as allocated


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan, 2.0**127, -3.0e38])
def test_a_number_that_no_scale_serves_spoils_its_group_and_no_other(wrong: float) -> None:
    values = groups(1.0, count=3)
    clean, clean_scales = encode(values, noise(values))
    values[1, 11] = wrong
    codes, scales = encode(values, noise(values))
    assert scales.isnan().tolist() == [False, True, False]
    assert codes[1].count_nonzero() == 0
    assert bool(decode(codes, scales)[1].isnan().all())
    assert torch.equal(codes[::2], clean[::2]) and torch.equal(scales[::2], clean_scales[::2])
    elsewhere = torch.tensor([0.0, abs(wrong), 0.0])  # and so does one of another rank
    values[1, 11] = 0.0
    other, other_scales = encode(values, noise(values), elsewhere)
    assert torch.equal(other, codes) and other_scales.isnan().tolist() == [False, True, False]


def test_the_largest_numbers_that_are_kept() -> None:
    values = torch.tensor([[torch.nextafter(torch.tensor(2.0**127), torch.tensor(0.0)), -1e38]])
    read = decode(*encode(values))
    assert bool(((read - values).abs() <= 2.0**-6 * values.abs() * 1.35).all())


def test_numbers_that_lie_elsewhere_count_by_their_peak() -> None:
    whole = groups(1.0, count=4)
    drawn = noise(whole)
    want, want_scales = encode(whole, drawn)
    for cut in (1, 20, 63):
        for here, there in ((slice(0, cut), slice(cut, 64)), (slice(cut, 64), slice(0, cut))):
            peaks = whole[:, there].abs().amax(1)
            codes, scales = encode(whole[:, here], drawn[:, here], peaks)
            assert torch.equal(codes, want[:, here]) and torch.equal(scales, want_scales)


@pytest.mark.parametrize("phase", [0, 5, 63])
def test_numbers_that_do_not_move_keep_their_codes(phase: int) -> None:
    storage, numel = Int8(), 300
    codes, scales = torch.zeros(numel, dtype=torch.int8), torch.zeros(7, dtype=torch.bfloat16)
    memory, span, place = (codes, scales), slice(0, numel), Groups(1, phase)
    generator = torch.Generator().manual_seed(phase)
    storage.store(memory, span, torch.randn(numel, generator=generator), None, place)
    before = codes.clone(), scales.clone()
    values = storage.load(memory, span, torch.float32, place)
    moves = torch.rand(numel, generator=generator) < 0.5
    smaller = torch.where(moves, 0.5 * values, values)  # within the old scale

    def draw(count: int) -> torch.Tensor:
        return torch.randint(1 << count, (numel,), generator=generator, dtype=torch.int32)

    storage.store(memory, span, smaller, draw, place._replace(moves=moves.view(10, 30)))
    assert torch.equal(codes[~moves], before[0][~moves])
    assert not torch.equal(codes, before[0])
    nothing = codes.clone(), scales.clone()
    read = storage.load(memory, span, torch.float32, place)
    storage.store(memory, span, read, draw, place._replace(moves=torch.tensor(False)))
    assert torch.equal(codes, nothing[0]) and torch.equal(scales[1:], nothing[1][1:])


def test_a_group_does_not_depend_on_those_beside_it() -> None:
    values, drawn = groups(1.0), noise(groups(1.0))
    codes, scales = encode(values, drawn)
    for part in (slice(0, 1), slice(7, 300)):
        codes_here, scales_here = encode(values[part], drawn[part])
        assert torch.equal(codes_here, codes[part]) and torch.equal(scales_here, scales[part])


def test_kinds_and_shapes() -> None:
    values = torch.ones(2, 32)
    codes, scales = encode(values)
    assert codes.dtype == torch.int8 and scales.dtype == torch.bfloat16
    assert codes.shape == (2, 32) and scales.shape == (2,)
    assert decode(codes, scales).dtype == torch.float32
    assert decode(*encode(values[:0])).shape == (0, 32)


@pytest.mark.parametrize(("size", "most"), [(32, 0.0084), (64, 0.0088), (128, 0.0091)])
def test_the_noise_is_what_the_table_says(size: int, most: float) -> None:
    values = groups(1.0, size=size)
    off = decode(*encode(values, noise(values))) - values
    assert float(off.square().mean().sqrt()) < most


def test_a_last_place_off_a_code_is_that_code() -> None:
    scales = torch.arange(0x3F00, 0x4000, 2, dtype=torch.int16).view(torch.bfloat16)
    exact = decode(CODES.expand(len(scales), -1), scales)
    for towards in (0.0, torch.inf, -torch.inf):
        values = torch.nextafter(exact, torch.tensor(towards))
        values = torch.where(CODES & 127 == 127, exact, values)
        for draw in (2**3, 2**16, 2**17 - 2**3):  # all but a 2**13th of the draws
            codes, again = encode(values, torch.full(values.shape, draw, dtype=torch.int32))
            assert torch.equal(again, scales)
            assert torch.equal(decode(codes, scales), exact)


def test_the_highest_code_reaches_the_largest_number() -> None:
    """Every mantissa of fp32 in steps, and those beside what code 127 stands for."""
    patterns = torch.arange(0x3F800000, 0x40800000, 37, dtype=torch.int32)
    scales = torch.arange(0x3F00, 0x4000, 2, dtype=torch.int16).view(torch.bfloat16)
    tops = decode(TOP.expand(len(scales), -1), scales).view(torch.int32) + torch.arange(-2, 3)
    values = torch.cat([patterns, tops.view(-1).int()]).view(torch.float32).view(-1, 1)
    for draw in (0, 2**17 - 1):
        codes, scales = encode(values, torch.full(values.shape, draw, dtype=torch.int32))
        assert_least(scales, values.view(-1))
        assert 125 <= int(codes.min()) <= int(codes.max()) == 127
