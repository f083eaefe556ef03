"""Random bits: the published generator, the same wherever they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from amsf_dist.storage.noise import bits, stream_of

WORD = 2**64


class SplittableRandom:
    """java.util.SplittableRandom in Python integers, one number after the other."""

    def __init__(self, seed: int) -> None:
        self.seed = seed % WORD

    def next_seed(self) -> int:
        self.seed = (self.seed + 0x9E3779B97F4A7C15) % WORD
        return self.seed

    def next_long(self) -> int:
        return mix64(self.next_seed())


def mix64(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def signed(word: int, width: int) -> int:
    return word - (1 << width) if word >> (width - 1) else word


def expected(index: list[int], seed: int, step: int, stream: int, count: int) -> list[int]:
    keys = SplittableRandom(mix64(seed % WORD) ^ stream % WORD)
    key = [keys.next_long() for _ in range(step + 1)][step]
    numbers = SplittableRandom(key)
    drawn = [numbers.next_long() for _ in range(max(index) // 8 + 1)]
    begins = {16: (0, 16, 32, 48), 17: (0, 15, 32, 47)}[count]
    found = []
    for i in index:
        word = drawn[i // 8]
        if i % 8 >= 4:
            word = word << 8 & WORD - 1 | word >> 56
        found.append(word >> begins[i % 4] & (1 << count) - 1)
    return found


# printed by OpenJDK 17
@pytest.mark.parametrize(
    ("seed", "longs"),
    [
        (0, [-2152535657050944081, 7960286522194355700, 487617019471545679]),
        (42, [-4767286540954276203, 2949826092126892291, 5139283748462763858]),
        (-1, [-1956407806741107680, -1612297016619662647, 4048727598324417001]),
        (0x1A2B3C4D5E6F7531, [4702092431771429328, 7268608334187797274, 5652645713660150195]),
    ],
)
def test_the_generator_of_this_test_is_the_published_one(seed: int, longs: list[int]) -> None:
    numbers = SplittableRandom(seed)
    assert [signed(numbers.next_long(), 64) for _ in longs] == longs


@pytest.mark.parametrize("count", [16, 17])
@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63, 2**64 - 1])
@pytest.mark.parametrize("stream", [0, stream_of("layers.0.q_proj.weight", "gap"), 2**64 - 1])
def test_bits_are_those_of_the_generator(seed: int, stream: int, count: int) -> None:
    index = [*range(9), 53, 1000, 1007]
    for step in (0, 1, 7):
        want = expected(index, seed, step, stream, count)
        assert bits(torch.tensor(index), seed, step, stream, count).tolist() == want


def test_known_answers_do_not_change() -> None:
    """A checkpoint of one version goes on in another with the same draws."""
    assert stream_of("layers.0.q_proj.weight", "gap") == 0x3091DEAD36691F7F
    assert stream_of("layers.0.q_proj.weight", "weight") == 0xA962F718304036C3
    drawn = bits(torch.tensor([0, 1, 2**31, 2**33 + 5, 2**40]), 7, 1000, 12345)
    assert drawn.tolist() == [25089, 5136, 65045, 36278, 65401]


def test_streams_of_names_and_roles_differ() -> None:
    pairs = [("a", "b"), ("a b", ""), ("", "a b"), ("a", " b"), ("ab", ""), ("b", "a"), ("ä", "b")]
    assert len({stream_of(*pair) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("step", [0, 3, 2**24 + 1, 2**40])
def test_a_step_counted_on_the_device_draws_the_same(step: int) -> None:
    index = torch.arange(1000)
    want = bits(index, 5, step, 9)
    assert torch.equal(want, bits(index, 5, torch.tensor(step), 9))
    assert torch.equal(want, bits(index, 5, torch.tensor(step, dtype=torch.float64), 9))


def test_the_step_is_not_read_by_the_host() -> None:
    index = torch.arange(10, device="meta")  # a meta tensor has nothing to read
    drawn = bits(index, 5, torch.zeros((), dtype=torch.float64, device="meta"), 9)
    assert drawn.dtype == torch.int32 and drawn.shape == (10,)


def test_a_draw_belongs_to_its_element_and_to_no_layout() -> None:
    index = torch.arange(10_000)
    whole = bits(index, 1, 2, 3)
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bits(index[order], 1, 2, 3), whole[order])
    assert torch.equal(bits(index.view(100, 100).t(), 1, 2, 3), whole.view(100, 100).t())
    assert torch.equal(torch.cat([bits(part, 1, 2, 3) for part in index.split(777)]), whole)
    assert torch.equal(index, torch.arange(10_000))
    assert bits(index[:0], 1, 2, 3).shape == (0,)


@pytest.mark.parametrize(
    "draws",
    [
        lambda n: bits(torch.arange(n), 0, 0, 0),
        lambda n: bits(torch.arange(n) * 4096, 3, 11, stream_of("w", "gap")),
        lambda n: torch.cat([bits(torch.arange(64), 1, step, 5) for step in range(n // 64)]),
        lambda n: torch.cat([bits(torch.arange(64), 1, 5, stream) for stream in range(n // 64)]),
        lambda n: torch.cat([bits(torch.arange(64), seed, 5, 5) for seed in range(n // 64)]),
    ],
    ids=["elements", "far apart", "steps", "streams", "seeds"],
)
def test_every_byte_is_uniform(draws: Callable[[int], Tensor]) -> None:
    drawn = draws(2**18)
    assert int(drawn.min()) >= 0 and int(drawn.max()) < 2**16
    for shift in (0, 8):
        count = torch.bincount((drawn >> shift) & 0xFF, minlength=256).double()
        mean = len(drawn) / 256
        chi_square = float(((count - mean) ** 2 / mean).sum())
        assert 255 - 6 * 22.6 < chi_square < 255 + 6 * 22.6  # 255 degrees of freedom


@pytest.mark.parametrize(
    ("other", "index"),
    [
        ((0, 0, 1), 0),
        ((0, 1, 0), 0),
        ((1, 0, 0), 0),
        ((0, 0, 0), 1),
        ((0, 0, 0), 4),
        ((0, 0, 0), 8),
        ((0, 0, 0), 2**34),
        ((2**63, 0, 0), 0),
        ((0, 2**32, 0), 0),
    ],
    ids=[
        "stream",
        "step",
        "seed",
        "next element",
        "the word rotated",
        "next word",
        "element + 2**34",
        "high seed",
        "high step",
    ],
)
def test_neighbours_have_nothing_in_common(other: tuple[int, int, int], index: int) -> None:
    n = 2**17
    ours, theirs = bits(torch.arange(n), 0, 0, 0), bits(torch.arange(n) + index, *other)
    equal = ~(ours ^ theirs)
    for bit in range(16):
        share = float((equal >> bit & 1).double().mean())
        assert abs(share - 0.5) < 6 * 0.5 / n**0.5
    x, y = ours.double() - 32767.5, theirs.double() - 32767.5
    correlation = float((x * y).mean() / (x.square().mean() * y.square().mean()).sqrt())
    assert abs(correlation) < 6 / n**0.5


@pytest.mark.parametrize("count", [16, 17])
def test_the_higher_bits_of_eight_elements_have_nothing_in_common(count: int) -> None:
    eight = (bits(torch.arange(2**20), 0, 0, 0, count) >> count - 8).double().view(-1, 8)
    between = torch.corrcoef(eight.t()) - torch.eye(8, dtype=torch.float64)
    # of 17 bits one is a neighbour's: a higher one at one of the two, worth a 2**8th at the other
    assert float(between.abs().max()) < 2.0**-8 * (count - 16) + 6 / len(eight) ** 0.5
