"""Promise: the Triton kernels equal the reference; here in Triton's interpreter, bit for bit.

Gradients are few bits long, so that sums of squares are exact in any order, and the reference's
roots are rounded to nearest (torch's on a CPU are not always). Then nothing is left to differ.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from models import assert_same_bits, everything, largest_difference
from torch import Tensor, nn
from waits import NoWaiting, Operations, a_device

pytest.importorskip("triton")

from amsf_dist import AMSF
from amsf_dist.kernels import choice
from amsf_dist.kernels.triton import measure, moments, move, noise, stepper, tables
from amsf_dist.kernels.triton.tables import Programs
from amsf_dist.reduce import BlockSums
from amsf_dist.storage.noise import bits, family_of, stream_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:RuntimeWarning"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU benchmarks/gpu_suite.py checks"
    ),
]

SHAPES = ((10, 6), (7,), (3, 130), (2, 4, 40), (1,), (5, 320))
WEIGHTS = ("native", "bf16+8", "bf16+16", "kahan", "stochastic")
KERNELS = (measure.measure, measure.add_parts, moments.advance_moments, move.move)
KERNELS += (move.measure_and_move, measure.measure_columns, measure.add_columns)
KERNELS += (moments.advance_matrices,)


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors are many tiles; and exact roots."""
    little = Programs(groups=4, tiles=2, columns=128, longest=300, item=256, blocks=8)
    monkeypatch.setattr(stepper.TritonKernel, "programs", little)
    root = Tensor.sqrt

    def exact(self: Tensor) -> Tensor:
        return root(self.double()).to(self.dtype)

    monkeypatch.setattr(Tensor, "sqrt", exact)
    monkeypatch.setattr(Tensor, "sqrt_", lambda self: self.copy_(exact(self)))


class Some(nn.Module):
    def __init__(self, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for index, shape in enumerate(shapes):
            values = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(f"p{index}", nn.Parameter(values))


def give_gradients(model: nn.Module, step: int, dtype: torch.dtype | None = None) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        drawn = torch.randint(-15, 16, param.shape, generator=generator)
        param.grad = (drawn / 64).to(param.dtype)


@contextmanager
def kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv(choice.AMSF_KERNEL, name)
        yield


def trained(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    steps: int = 2,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    spoil: Any = lambda model, step: None,
    **options: Any,
) -> Any:
    model = Some(dtype, shapes)
    with kernel(name, monkeypatch):
        optimizer = AMSF(model, **{"lr": 0.02, "weight_decay": 0.1, **options})
        kinds = {
            type(one).__name__
            for unit in optimizer._ready().units
            for lane in unit.lanes
            for one in lane.kernels
        }
        assert kinds == {"TritonKernel" if name == "triton" else "Reference"}
        for step in range(steps):
            give_gradients(model, step)
            spoil(model, step)
            optimizer.step()
    return everything(model, optimizer), optimizer.skipped_steps


def assert_equal(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, **options: Any) -> Any:
    ours = trained("triton", monkeypatch, dtype, **options)
    theirs = trained("reference", monkeypatch, dtype, **options)
    assert_same_bits(ours[0], theirs[0])
    assert ours[1] == theirs[1]
    return ours


# every storage of weights with every storage of lines, every rule and every kind of block at least
# once each with every other
CASES = [
    (dtype, weights, state, averaging, blocks)
    for index, (dtype, weights, state) in enumerate(
        [(torch.float32, "native", state) for state in ("fp32", "bf16", "int8")]
        + [
            (dtype, weights, state)
            for dtype in (torch.bfloat16, torch.float16)
            for weights in WEIGHTS
            for state in ("fp32", "bf16", "int8")
        ]
    )
    for averaging, blocks in [
        (
            ("schedule_free", "ema")[index % 2],
            ("element", "row", "tensor", "factored")[index // 2 % 4],
        ),
    ]
]


@pytest.mark.parametrize(("dtype", "weights", "state", "averaging", "blocks"), CASES)
def test_a_step_equals_the_reference(
    dtype: torch.dtype,
    weights: str,
    state: str,
    averaging: str,
    blocks: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"weight_storage": weights, "state_storage": state, "averaging": averaging}
    shapes = SHAPES[:4]
    assert_equal(monkeypatch, dtype, blocks=blocks, shapes=shapes, **options)


@pytest.mark.parametrize("averaging", ["schedule_free", "ema"])
@pytest.mark.parametrize("blocks", ["auto", "element", "row", "tensor", "factored"])
def test_every_rule_over_every_kind_of_block(
    averaging: str, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"state_storage": "int8", "averaging": averaging, "warmup_steps": 3}
    assert_equal(monkeypatch, torch.bfloat16, blocks=blocks, decay="matrices", **options)


def test_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [{"pattern": "p", "kind": "head", "head_dim": 4}]
    shapes = [(8, 20), (12, 70), (4, 33)]
    options = {"blocks": rules, "shapes": shapes, "state_storage": "int8"}
    assert_equal(monkeypatch, torch.bfloat16, **options)


@pytest.mark.parametrize(
    "clip", [{"clip": "block"}, {"clip": "tensor"}, {"max_norm": 0.1}], ids=str
)
@pytest.mark.parametrize("blocks", ["element", "row", "factored"])
def test_clipping(clip: dict[str, Any], blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = trained("triton", monkeypatch, torch.float32, blocks=blocks, **clip)
    theirs, _ = trained("reference", monkeypatch, torch.float32, blocks=blocks, **clip)
    for index, state in ours["state"].items():  # norms are summed in another order
        difference, name = largest_difference(state, theirs["state"][index])
        assert difference < 1e-6, name
    assert largest_difference(ours["weights"], theirs["weights"])[0] < 1e-6


@pytest.mark.parametrize("blocks", ["element", "row", "tensor", "factored"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(
    blocks: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: nn.Module, step: int) -> None:
        if step in (0, 2):
            list(model.parameters())[step].grad.view(-1)[0] = bad

    options = {"blocks": blocks, "spoil": spoil, "steps": 4, "state_storage": "int8"}
    _, skipped = assert_equal(monkeypatch, torch.bfloat16, **options)
    assert skipped == 2


def let_blocks_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under sharding that cuts no block; asked for here on one process."""
    plain = BlockSums.__init__

    def unshared(self: BlockSums, *args: Any) -> None:
        plain(self, *args)
        self.everyone_knows = False

    monkeypatch.setattr(BlockSums, "__init__", unshared)


def spoil_some_blocks(model: nn.Module, step: int) -> None:
    if step != 1:
        for param in model.parameters():
            param.grad.view(-1)[:: 7 + step][:5] = float("nan")


@pytest.mark.parametrize("blocks", ["element", "row", "factored"])
@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_blocks_that_decide_for_themselves(
    blocks: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_blocks_decide(monkeypatch)
    monkeypatch.setattr(tables, "_fits", lambda *args: False)
    options = {"blocks": blocks, "spoil": spoil_some_blocks, "steps": 3, "state_storage": state}
    _, skipped = assert_equal(monkeypatch, torch.bfloat16, **options)
    assert skipped == 2


@pytest.mark.parametrize("averaging", ["schedule_free", "ema"])
@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("clip", [None, "block"])
def test_blocks_are_measured_and_moved_in_one_launch(
    averaging: str, state: str, clip: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_blocks_decide(monkeypatch)
    launches = count_launches(monkeypatch)
    options = {"averaging": averaging, "state_storage": state, "clip": clip}
    options.update(shapes=[(6, 64), (9, 192), (2, 3, 64)], blocks="row", decay="matrices")
    options.update(spoil=spoil_some_blocks, steps=3)
    _, skipped = assert_equal(monkeypatch, torch.bfloat16, **options)
    assert skipped == 2
    assert launches == ["measure_and_move"] * 3


def test_parameters_without_a_gradient_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: nn.Module, step: int) -> None:
        if step < 2:
            list(model.parameters())[step].grad = None

    options = {"spoil": spoil, "steps": 3, "state_storage": "bf16"}
    assert_equal(monkeypatch, torch.bfloat16, averaging="ema", **options)


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the kernels' names as they are launched."""
    launches: list[str] = []
    for one in KERNELS:
        run = one.run

        def counted(*args: Any, one: Any = one, run: Any = run, **kwargs: Any) -> Any:
            launches.append(one.fn.__name__)
            return run(*args, **kwargs)

        monkeypatch.setattr(one, "run", counted)
    return launches


def test_one_launch_steps_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their number: one launch per kernel, and one more of `move` for element blocks."""
    little = Programs(groups=4, tiles=2, columns=64, longest=300, item=256, blocks=8)
    monkeypatch.setattr(stepper.TritonKernel, "programs", little)
    launches = count_launches(monkeypatch)
    trained("triton", monkeypatch, torch.float32, steps=1, shapes=[(2, 64)] * 9 + [(16,)] * 9)
    assert sorted(launches) == ["advance_moments", "measure", "move", "move"]
    launches.clear()
    matrices = {"shapes": [(3, 64)] * 9, "blocks": "factored"}
    trained("triton", monkeypatch, torch.float32, steps=1, **matrices)
    columns = ["add_columns", "add_parts", "advance_matrices", "measure_columns"]
    assert sorted(launches) == sorted([*columns, "advance_moments", "measure", "move"])


@pytest.mark.parametrize("blocks", ["auto", "factored"])
def test_a_step_on_a_device_never_waits(blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches themselves are left out: the interpreter reads its arguments."""
    ran: list[int] = []
    for one in KERNELS:
        monkeypatch.setattr(one, "run", lambda *args, **kwargs: ran.append(1))
    monkeypatch.setenv(choice.AMSF_KERNEL, "triton")
    model = Some(torch.bfloat16)
    optimizer = AMSF(model, max_norm=1.0, state_storage="int8", blocks=blocks)
    with a_device(monkeypatch):
        for step in range(3):
            give_gradients(model, step)
            with NoWaiting():
                optimizer.step()
    assert ran


def test_draws_are_those_of_the_reference() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def draw(out, given, steps, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
        offsets = tl.arange(0, 2)[:, None] * 64 + tl.arange(0, 64)[None, :]
        key = noise.key_of(tl.load(given), tl.load(steps).to(tl.int64))
        drawn = noise.random_bits(key, tl.load(given + 1), offsets, COUNT, ALIGNED)
        tl.store(out + offsets, drawn)

    for seed, step, place in [(0, 1, 0), (7, 123456, 2**40 + 3), (2**63 + 5, 2**33, 2**31 - 8)]:
        stream = stream_of("model.layers.3.mlp.up_proj.weight", "gap")
        given = torch.tensor([family_of(seed, stream), place])
        for count, aligned in product((16, 17), (False, True) if place % 8 == 0 else (False,)):
            out = torch.zeros(128, dtype=torch.int32)
            steps = torch.tensor([step], dtype=torch.float64)
            draw[(1,)](out, given, steps, COUNT=count, ALIGNED=aligned)
            expected = bits(torch.arange(place, place + 128), seed, step, stream, count)
            assert torch.equal(out, expected)


@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_numbers_at_the_edges_are_kept_as_by_the_reference(
    state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are infinite, NaN, subnormal and on the edges of their dtypes."""
    edges = [0.0, -0.0, 1e-40, -3e-45, 6e-8, 6.1e-5, 65504.0, -65520.0, 3.38e38, -3.4e38, 1e-30]

    def spoil(model: nn.Module, step: int) -> None:
        if step == 0:
            with torch.no_grad():
                for param in model.parameters():
                    param.view(-1)[: len(edges)] = torch.tensor(edges).to(param.dtype)
                    param.view(-1)[len(edges)] = float("inf")

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for weights in WEIGHTS if dtype != torch.float32 else WEIGHTS[:1]:
            options = {"weight_storage": weights, "state_storage": state, "spoil": spoil}
            options.update(shapes=[(2, 64)], weight_decay=0.0)
            ours, _ = trained("triton", monkeypatch, dtype, **options)
            theirs, _ = trained("reference", monkeypatch, dtype, **options)
            for name, value in without_nan(ours).items():
                assert_same_bits(value, without_nan(theirs)[name], f"{dtype} {weights} {name}")


def without_nan(trained: Any) -> dict[str, Tensor]:
    """NaN as a number that is like no other, so that it equals itself."""
    found = {**trained["weights"], **trained["state"][0]}
    return {
        name: value.nan_to_num(nan=123.0, posinf=torch.inf, neginf=-torch.inf)
        for name, value in found.items()
        if isinstance(value, Tensor)
    }


def test_an_unknown_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.AMSF_KERNEL, "fast")
    with pytest.raises(ValueError, match="AMSF_KERNEL must be .*, got 'fast'"):
        AMSF(Some(torch.float32))


@pytest.mark.parametrize("blocks", ["row", "factored"])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_norm": 1.0}, {"clip": "tensor"}, {"clip": "block"}, {"nonfinite": "block"}],
    ids=str,
)
def test_operations_do_not_grow_with_the_tensors(
    blocks: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host of a GPU takes longer for one than the GPU for most tensors."""
    for one in KERNELS:
        monkeypatch.setattr(one, "run", lambda *args, **kwargs: None)
    monkeypatch.setenv(choice.AMSF_KERNEL, "triton")
    counts = []
    for number in (3, 12):
        model = Some(torch.bfloat16, [(4, 128)] * number)
        optimizer = AMSF(model, state_storage="int8", blocks=blocks, **options)
        with a_device(monkeypatch):
            for step in range(2):
                give_gradients(model, step)
                with Operations() as seen:
                    optimizer.step()
        counts.append(seen.names)
    assert counts[0] == counts[1]
    assert len(counts[0]) < 100
