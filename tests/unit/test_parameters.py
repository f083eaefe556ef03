"""Parameters of every kind: dtypes, sizes, memory orders, frozen, unused, unfrozen later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from models import Little, assert_same_bits, fit
from torch import Tensor, nn

from amsf_dist import AMSF

AVERAGINGS = pytest.mark.parametrize("averaging", ["schedule_free", "ema"])
BLOCKS = pytest.mark.parametrize("blocks", ["auto", "row", "tensor", "element"])


def numbers(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


def walk(
    param: nn.Parameter,
    optimizer: Any,
    steps: int = 4,
    *,
    lay_out: Callable[[Tensor], Tensor] = lambda grad: grad,
    dtype: torch.dtype | None = None,
) -> None:
    """Step along made-up gradients, laid out in memory as the test wants."""
    for step in range(steps):
        param.grad = lay_out(numbers(param.shape, 100 + step, dtype or param.dtype))
        optimizer.step()


# Memory order -----------------------------------------------------------------------------------


def transposed(values: Tensor) -> Tensor:
    return values.transpose(0, -1).contiguous().transpose(0, -1)


def channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


def every_second_column(values: Tensor) -> Tensor:
    wide = torch.zeros(*values.shape[:-1], 2 * values.shape[-1], dtype=values.dtype)
    wide[..., ::2] = values
    return wide[..., ::2]


def inside_a_larger_tensor(values: Tensor) -> Tensor:
    around = torch.zeros(values.numel() + 7, dtype=values.dtype)
    inner = around[3 : 3 + values.numel()].view(values.shape)
    return inner.copy_(values)


LAYOUTS = pytest.mark.parametrize(
    ("lay_out", "shape"),
    [
        (transposed, (6, 8)),
        (transposed, (5, 4, 3)),
        (channels_last, (4, 3, 2, 2)),
        (every_second_column, (6, 8)),
        (inside_a_larger_tensor, (6, 8)),
    ],
)


@AVERAGINGS
@BLOCKS
@LAYOUTS
def test_the_order_of_a_parameter_s_memory_does_not_matter(
    lay_out: Callable[[Tensor], Tensor], shape: tuple[int, ...], blocks: str, averaging: str
) -> None:
    name = "conv.weight" if len(shape) == 4 else "up_proj.weight"
    options = {"lr": 0.1, "averaging": averaging, "blocks": blocks, "weight_decay": 0.1}
    plain, strange = nn.Parameter(numbers(shape, 0)), nn.Parameter(lay_out(numbers(shape, 0)))
    assert plain.stride() != strange.stride() or lay_out is inside_a_larger_tensor
    ours, theirs = AMSF([(name, strange)], **options), AMSF([(name, plain)], **options)
    stride = strange.stride()
    walk(strange, ours, lay_out=lay_out)
    walk(plain, theirs)
    assert_same_bits(strange.detach(), plain.detach())
    assert strange.stride() == stride
    ours.eval()
    theirs.eval()
    assert_same_bits(strange.detach(), plain.detach())
    ours.train()
    theirs.train()
    walk(strange, ours)  # a contiguous gradient beside a strided parameter
    walk(plain, theirs, lay_out=lay_out)  # and the other way round
    assert_same_bits(strange.detach(), plain.detach())


def test_numbers_around_a_parameter_are_left_alone() -> None:
    around = torch.full((4, 10), 7.0)
    param = nn.Parameter(around[:, ::2])
    assert param.data_ptr() == around.data_ptr()
    walk(param, AMSF([("up_proj.weight", param)], lr=0.1))
    assert bool((around[:, 1::2] == 7.0).all())
    assert not bool((around[:, ::2] == 7.0).any())


@BLOCKS
def test_a_gradient_may_be_one_number_seen_many_times(blocks: str) -> None:
    """The gradient of a sum is an expanded scalar."""
    param, theirs = (nn.Parameter(numbers((6, 8), 0)) for _ in range(2))
    ours, other = (AMSF([("up_proj.weight", p)], lr=0.1, blocks=blocks) for p in (param, theirs))
    param.grad = torch.ones(()).expand(6, 8)
    theirs.grad = torch.ones(6, 8)
    ours.step()
    other.step()
    assert_same_bits(param.detach(), theirs.detach())


# Sizes ------------------------------------------------------------------------------------------


@AVERAGINGS
@BLOCKS
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 3), (1, 1), (1, 5), (5, 1)], ids=str)
def test_parameters_of_every_size_step_save_and_change_modes(
    shape: tuple[int, ...], blocks: str, averaging: str
) -> None:
    param = nn.Parameter(numbers(shape, 0))
    before = param.detach().clone()
    optimizer = AMSF([("up_proj.weight", param)], lr=0.1, blocks=blocks, averaging=averaging)
    walk(param, optimizer)
    assert param.numel() == 0 or bool((param != before).all())
    after = param.detach().clone()
    optimizer.eval()
    optimizer.train()
    assert_same_bits(param.detach(), after)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.memory()["weights"] == 4 * param.numel()


@AVERAGINGS
def test_a_zero_dim_parameter_moves_as_an_element(averaging: str) -> None:
    scalar, vector = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor([2.0]))
    ours, theirs = (AMSF([p], lr=0.1, averaging=averaging) for p in (scalar, vector))
    for value in (0.3, -1.0, 2.0):
        scalar.grad, vector.grad = torch.tensor(value), torch.tensor([value])
        ours.step()
        theirs.step()
    assert scalar.item() == vector.item()


@BLOCKS
def test_a_parameter_larger_than_a_tile_moves_as_in_fp64(blocks: str) -> None:
    """Blocks of more numbers than fit in one tile, and tiles that end inside a row's blocks."""
    shape = (3, 70_001)
    param = nn.Parameter(numbers(shape, 0))
    exact = nn.Parameter(param.detach().double())
    ours, theirs = (AMSF([("up_proj.weight", p)], lr=0.1, blocks=blocks) for p in (param, exact))
    walk(param, ours, 3, dtype=torch.float32)
    walk(exact, theirs, 3, lay_out=Tensor.double, dtype=torch.float32)
    torch.testing.assert_close(param.detach().double(), exact.detach(), rtol=1e-5, atol=2e-6)


# Dtypes -----------------------------------------------------------------------------------------


@AVERAGINGS
@BLOCKS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_fp32_arithmetic_rounded_once(
    dtype: torch.dtype, blocks: str, averaging: str
) -> None:
    low = nn.Parameter(numbers((6, 8), 0, dtype))
    wide = nn.Parameter(low.detach().float())
    options = {"lr": 0.1, "blocks": blocks, "averaging": averaging, "weight_decay": 0.1}
    options["weight_storage"] = "native"
    ours, theirs = (AMSF([("up_proj.weight", p)], **options) for p in (low, wide))
    for step in range(6):
        low.grad = numbers((6, 8), step, dtype)
        wide.grad = low.grad.float()
        ours.step()
        theirs.step()
        with torch.no_grad():
            wide.copy_(wide.to(dtype))
        assert_same_bits(low.detach().float(), wide.detach())
    line = "gap" if averaging == "schedule_free" else "exp_avg"
    for key in (line, "exp_avg_sq"):
        assert ours.state[low][key].dtype == torch.float32
        assert_same_bits(ours.state[low][key], theirs.state[wide][key])


def test_fp64_parameters_are_fp64_throughout() -> None:
    param = nn.Parameter(numbers((6, 8), 0, torch.float64))
    optimizer = AMSF([("up_proj.weight", param)])
    assert {value.dtype for value in optimizer.state[param].values()} == {torch.float64}


def test_parameters_of_several_dtypes_train_together() -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    together = [nn.Parameter(numbers((4, 6), 0, dtype)) for dtype in dtypes]
    alone = [nn.Parameter(param.detach().clone()) for param in together]
    one = AMSF(together, lr=0.1)
    several = [AMSF([param], lr=0.1) for param in alone]
    for step in range(4):
        for param, twin in zip(together, alone, strict=True):
            param.grad = numbers((4, 6), step, param.dtype)
            twin.grad = param.grad.clone()
        one.step()
        for optimizer in several:
            optimizer.step()
    assert_same_bits([p.detach() for p in together], [p.detach() for p in alone])


# Frozen, unused, unfrozen -----------------------------------------------------------------------


@AVERAGINGS
def test_frozen_and_unused_parameters_stand_still(averaging: str) -> None:
    model = Little()
    model.unused = nn.Linear(3, 3)
    model.embed_tokens.requires_grad_(False)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = AMSF(model.named_parameters(), lr=0.1, averaging=averaging, weight_decay=0.5)
    fit(model, optimizer, 5)
    optimizer.eval()
    for name, param in model.named_parameters():
        stands = name.startswith(("embed_tokens", "unused"))
        assert bool((param == before[name]).all()) is stands, name


@AVERAGINGS
def test_an_unfrozen_parameter_starts_its_own_count(averaging: str) -> None:
    """As a group added in flight does: its first steps are warmed up and corrected as such."""
    model, theirs = Little(), Little()
    options = {"lr": 0.02, "averaging": averaging, "warmup_steps": 3, "r": 1.0}
    model.norm.requires_grad_(False)
    optimizer = AMSF(model.named_parameters(), **options)
    fit(model, optimizer, 4)
    model.norm.requires_grad_(True)
    fit(model, optimizer, range(4, 8))

    norms = [(n, p) for n, p in theirs.named_parameters() if n.startswith("norm")]
    rest = [(n, p) for n, p in theirs.named_parameters() if not n.startswith("norm")]
    theirs.norm.requires_grad_(False)
    one = AMSF(rest, **options)
    fit(theirs, one, 4)
    theirs.norm.requires_grad_(True)
    other = AMSF(norms, **options)
    fit(theirs, one, range(4, 8), before_step=lambda _: other.step())
    assert_same_bits(model, theirs)


@AVERAGINGS
def test_a_parameter_frozen_in_flight_keeps_its_state(averaging: str) -> None:
    model = Little()
    optimizer = AMSF(model, lr=0.02, averaging=averaging)
    fit(model, optimizer, 3)
    model.norm.requires_grad_(False)
    weights = model.norm.weight.detach().clone()
    moment = optimizer.state[model.norm.weight]["exp_avg_sq"].clone()
    fit(model, optimizer, range(3, 6))
    assert_same_bits(model.norm.weight.detach(), weights)
    assert_same_bits(optimizer.state[model.norm.weight]["exp_avg_sq"], moment)
    model.norm.requires_grad_(True)
    fit(model, optimizer, range(6, 8))
    assert bool((model.norm.weight != weights).any())


def test_a_step_without_any_gradient_moves_no_weight() -> None:
    model = Little()
    optimizer = AMSF(model, lr=0.02, weight_decay=0.5)
    fit(model, optimizer, 3)
    optimizer.zero_grad()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer.step()
    assert_same_bits(dict(model.named_parameters()), before)
    optimizer.eval()
    optimizer.train()
    assert_same_bits(dict(model.named_parameters()), before)


def test_parameters_replaced_before_training_are_taken_as_they_are() -> None:
    """`to_empty` on a model from the meta device makes new parameters; a wrapper swaps them in."""
    with torch.device("meta"):
        model = Little()
    optimizer = AMSF(model, lr=0.02)
    assert all(entries["gap"].is_meta for entries in optimizer.state.values())
    model.to_empty(device="cpu")
    model.load_state_dict(Little().state_dict())
    optimizer.param_groups[0]["params"][:] = list(model.parameters())
    fit(model, optimizer, 3)
    theirs = Little()
    fit(theirs, AMSF(theirs, lr=0.02), 3)
    assert_same_bits(model, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_may_be_cast_after_the_optimizer_was_built(dtype: torch.dtype) -> None:
    """`model.bfloat16()` changes the dtype of the very parameters that we hold."""
    model, theirs = Little(), Little(dtype)
    optimizer = AMSF(model, lr=0.02)
    model.to(dtype)
    fit(model, optimizer, 3)
    fit(theirs, AMSF(theirs, lr=0.02), 3)
    assert_same_bits(model, theirs)
    optimizer.eval()
    optimizer.train()
    assert_same_bits(model, theirs)
