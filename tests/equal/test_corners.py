"""Promise 1: each of the four corners is the algorithm that its papers' authors ship.

    averaging        over elements                     over Adam-mini's blocks
    ema              torch.optim.AdamW                 adam_mini.Adam_mini
    schedule_free    schedulefree.AdamWScheduleFree    AMSF: nobody ships it, so tests/reference.py,
                                                       which first proves itself against the others

A key projection's bias adds the same number to all scores of a query, which softmax ignores: its
true gradient is zero, and what arrives is rounding noise that Adam divides by its own size. It is
left out by name, but where eps is large enough to drown the noise, and then it is compared too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optimi
import pytest
import torch
from adam_mini import Adam_mini
from models import Shape, Transformer, fit, largest_difference
from reference import AdamMiniReference, ScheduleFreeReference, mean_square, numel_per_block
from schedulefree import AdamWScheduleFree
from torch.optim.lr_scheduler import LambdaLR

from amsf_dist import AMSF

STEPS = 100
FP64, FP32 = 1e-10, 2e-5
NO_TRUE_GRADIENT = ("k_proj.bias",)
BASE: dict[str, Any] = {"lr": 5e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
WIDE_HEADS = Shape(dim=32, heads=4, kv_heads=2, head_dim=16)  # 16, and dim / heads is 8

EVERYTHING: tuple[str, ...] = ()
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance", "eps", "leave_out"),
    [
        (torch.float64, FP64, 1e-8, NO_TRUE_GRADIENT),
        (torch.float64, FP64, 1e-5, EVERYTHING),
        (torch.float32, FP32, 1e-8, NO_TRUE_GRADIENT),
    ],
    ids=["fp64", "fp64 every parameter", "fp32"],
)
SHAPES = pytest.mark.parametrize("shape", [Shape(), WIDE_HEADS], ids=["heads", "wide heads"])
ADAM_OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.0},
        {"weight_decay": 1.0},
        {"eps": 1e-3},
        {"betas": (0.5, 0.999)},
        {"betas": (0.0, 0.9)},
    ],
    ids=str,
)
FREE_OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.0},
        {"weight_decay": 1.0},
        {"eps": 1e-3},
        {"betas": (0.98, 0.999)},
        {"warmup_steps": 30},
        {"warmup_steps": 1000},
        {"r": 2.0},
        {"r": 0.5, "warmup_steps": 10},
        {"weight_lr_power": 0.0, "warmup_steps": 30},
        {"weight_lr_power": 1.0, "warmup_steps": 30, "r": 3.0},
    ],
    ids=str,
)

FREE_COMBINATIONS = pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 1.0, "eps": 1e-3, "betas": (0.98, 0.999)},
        {"weight_decay": 0.0, "warmup_steps": 1000, "r": 2.0},
        {"weight_lr_power": 0.0, "warmup_steps": 30},
        {"weight_lr_power": 1.0, "warmup_steps": 30, "r": 3.0},
    ],
    ids=str,
)


def assert_close(
    ours: Any, theirs: Any, tolerance: float, leave_out: tuple[str, ...] = NO_TRUE_GRADIENT
) -> None:
    error, name = largest_difference(ours, theirs, leave_out=leave_out)
    assert error <= tolerance, f"{name} differs by {error:.1e}"


def pair(shape: Shape | None = None, dtype: torch.dtype = torch.float64) -> list[Transformer]:
    return [Transformer(shape, dtype=dtype), Transformer(shape, dtype=dtype)]


def block_numels(model: Transformer) -> dict[str, int]:
    return {
        name: numel_per_block(name, tuple(param.shape), model.shape.head_dim)
        for name, param in model.named_parameters()
    }


def hide_gradients(model: Transformer) -> Callable[[int], None]:
    """Take away some gradients in some steps, one from the first steps on and one for good."""

    def before_step(step: int) -> None:
        for name, param in model.named_parameters():
            if (
                (name.endswith("v_proj.weight") and step % 3 == 1)
                or (name.endswith("up_proj.weight") and step < 5)
                or (name.endswith("input_layernorm.weight") and step > 70)
                or name.endswith("q_proj.bias")
            ):
                param.grad = None

    return before_step


def in_flight(optimizer: Any) -> LambdaLR:
    """A learning rate that rises, stands still, falls and is zero for a while."""
    shape = [0.1, 0.5, 1.0, 1.0, 0.7, 0.3, 0.0, 0.2, 0.4, 0.1, 0.0]
    return LambdaLR(optimizer, lambda step: shape[step // 10])


def two_groups(model: Transformer) -> list[dict[str, Any]]:
    """Matrices with decay, the rest without it and with another learning rate."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() >= 2]
    rest = [(name, p) for name, p in model.named_parameters() if p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": 0.3},
        {"params": rest, "weight_decay": 0.0, "lr": 1e-3, "betas": (0.8, 0.99)},
    ]


def without_names(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**group, "params": [p for _, p in group["params"]]} for group in groups]


# torch.optim.AdamW ------------------------------------------------------------------------------


def amsf_adamw(params: Any, **options: Any) -> AMSF:
    return AMSF(params, averaging="ema", blocks="element", **{**BASE, **options})


@DTYPES
@SHAPES
def test_ema_over_elements_is_adamw(
    shape: Shape, dtype: torch.dtype, tolerance: float, eps: float, leave_out: tuple[str, ...]
) -> None:
    ours, theirs = pair(shape, dtype)
    fit(ours, amsf_adamw(ours, eps=eps), STEPS)
    fit(theirs, torch.optim.AdamW(theirs.parameters(), **{**BASE, "eps": eps}), STEPS)
    assert_close(ours, theirs, tolerance, leave_out)


@ADAM_OPTIONS
def test_ema_over_elements_is_adamw_with_every_option(options: dict[str, Any]) -> None:
    ours, theirs = pair()
    fit(ours, amsf_adamw(ours, **options), STEPS)
    fit(theirs, torch.optim.AdamW(theirs.parameters(), **{**BASE, **options}), STEPS)
    assert_close(ours, theirs, FP64)


def test_ema_over_elements_is_adamw_in_several_groups() -> None:
    ours, theirs = pair()
    fit(ours, amsf_adamw(two_groups(ours)), STEPS)
    fit(theirs, torch.optim.AdamW(without_names(two_groups(theirs)), **BASE), STEPS)
    assert_close(ours, theirs, FP64)


def test_ema_over_elements_is_adamw_under_a_scheduler() -> None:
    ours, theirs = pair()
    amsf, adamw = amsf_adamw(ours), torch.optim.AdamW(theirs.parameters(), **BASE)
    fit(ours, amsf, STEPS, scheduler=in_flight(amsf))
    fit(theirs, adamw, STEPS, scheduler=in_flight(adamw))
    assert_close(ours, theirs, FP64)


def test_ema_counts_steps_per_parameter_as_adamw_does() -> None:
    ours, theirs = pair()
    amsf, adamw = amsf_adamw(ours), torch.optim.AdamW(theirs.parameters(), **BASE)
    fit(ours, amsf, STEPS, before_step=hide_gradients(ours))
    fit(theirs, adamw, STEPS, before_step=hide_gradients(theirs))
    assert_close(ours, theirs, FP64)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        expected = float(adamw.state[other]["step"]) if other in adamw.state else 0.0
        assert float(amsf.state[mine]["step"]) == expected


def test_ema_warms_up_linearly_over_warmup_steps() -> None:
    ours, theirs = pair()
    fit(ours, amsf_adamw(ours, warmup_steps=40), STEPS)
    adamw = torch.optim.AdamW(theirs.parameters(), **BASE)
    fit(theirs, adamw, STEPS, scheduler=LambdaLR(adamw, lambda step: min(1.0, (step + 1) / 40)))
    assert_close(ours, theirs, FP64)


def test_ema_moments_are_those_of_adamw() -> None:
    ours, theirs = pair()
    amsf, adamw = amsf_adamw(ours), torch.optim.AdamW(theirs.parameters(), **BASE)
    fit(ours, amsf, STEPS)
    fit(theirs, adamw, STEPS)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert_close({name: amsf.state[mine][key]}, {name: adamw.state[other][key]}, FP64)


@pytest.mark.filterwarnings("ignore:You are using weight_decay")
@pytest.mark.parametrize("max_lr", [None, 2e-2])
def test_decoupled_decay_is_that_of_optimi(max_lr: float | None) -> None:
    """Decay is multiplied by lr / max_lr, so it does not depend on how high lr is."""
    ours, theirs = pair()
    options = {"decouple_lr": True, "max_lr": max_lr, "weight_decay": 1e-3}
    amsf = amsf_adamw(ours, **options)
    adamw = optimi.AdamW(theirs.parameters(), **{**BASE, **options}, triton=False, foreach=False)
    fit(ours, amsf, STEPS, scheduler=in_flight(amsf))
    fit(theirs, adamw, STEPS, scheduler=in_flight(adamw))
    assert_close(ours, theirs, FP64)


@pytest.mark.parametrize("averaging", ["ema", "schedule_free"])
def test_decoupled_decay_is_ordinary_decay_divided_by_the_highest_lr(averaging: str) -> None:
    ours, theirs = pair()
    options = {**BASE, "averaging": averaging, "blocks": "adam_mini"}
    decoupled = AMSF(ours, **{**options, "decouple_lr": True, "weight_decay": 1e-3})
    ordinary = AMSF(theirs, **{**options, "weight_decay": 1e-3 / BASE["lr"]})
    fit(ours, decoupled, STEPS, scheduler=in_flight(decoupled))
    fit(theirs, ordinary, STEPS, scheduler=in_flight(ordinary))
    assert_close(ours, theirs, FP64)


# schedulefree.AdamWScheduleFree -----------------------------------------------------------------


def amsf_schedule_free(params: Any, **options: Any) -> AMSF:
    return AMSF(params, blocks="element", **{**BASE, **options})


def schedule_free(params: Any, **options: Any) -> AdamWScheduleFree:
    optimizer = AdamWScheduleFree(params, **{**BASE, **options})
    optimizer.train()
    return optimizer


def assert_same_average(
    ours: Transformer,
    amsf: AMSF,
    theirs: Transformer,
    upstream: Any,
    tolerance: float,
    leave_out: tuple[str, ...] = NO_TRUE_GRADIENT,
) -> None:
    """y, x by `averaged_state_dict`, x by `eval`, and y again after `train`."""
    assert_close(ours, theirs, tolerance, leave_out)
    average = amsf.averaged_state_dict(ours)
    upstream.eval()
    amsf.eval()
    assert_close(ours, theirs, tolerance, leave_out)
    assert_close(
        {name: average[name] for name, _ in ours.named_parameters()},
        dict(theirs.named_parameters()),
        tolerance,
        leave_out,
    )
    upstream.train()
    amsf.train()
    assert_close(ours, theirs, tolerance, leave_out)


@DTYPES
@SHAPES
def test_schedule_free_over_elements_is_adamw_schedule_free(
    shape: Shape, dtype: torch.dtype, tolerance: float, eps: float, leave_out: tuple[str, ...]
) -> None:
    ours, theirs = pair(shape, dtype)
    amsf, upstream = amsf_schedule_free(ours, eps=eps), schedule_free(theirs.parameters(), eps=eps)
    fit(ours, amsf, STEPS)
    fit(theirs, upstream, STEPS)
    assert_same_average(ours, amsf, theirs, upstream, tolerance, leave_out)


@FREE_OPTIONS
def test_schedule_free_over_elements_is_adamw_schedule_free_with_every_option(
    options: dict[str, Any],
) -> None:
    ours, theirs = pair()
    amsf = amsf_schedule_free(ours, **options)
    upstream = schedule_free(theirs.parameters(), **options)
    fit(ours, amsf, STEPS)
    fit(theirs, upstream, STEPS)
    assert_same_average(ours, amsf, theirs, upstream, FP64)


def test_the_base_iterate_is_that_of_schedule_free() -> None:
    ours, theirs = pair()
    amsf, upstream = amsf_schedule_free(ours), schedule_free(theirs.parameters())
    fit(ours, amsf, STEPS)
    fit(theirs, upstream, STEPS)
    beta1 = BASE["betas"][0]
    z = {name: p.detach() - beta1 * amsf.state[p]["gap"] for name, p in ours.named_parameters()}
    assert_close(z, {name: upstream.state[p]["z"] for name, p in theirs.named_parameters()}, FP64)


def test_schedule_free_over_elements_is_adamw_schedule_free_in_several_groups() -> None:
    ours, theirs = pair()
    amsf = amsf_schedule_free(two_groups(ours), warmup_steps=10)
    upstream = schedule_free(without_names(two_groups(theirs)), warmup_steps=10)
    fit(ours, amsf, STEPS)
    fit(theirs, upstream, STEPS)
    assert_same_average(ours, amsf, theirs, upstream, FP64)


def test_schedule_free_over_elements_is_adamw_schedule_free_under_a_scheduler() -> None:
    ours, theirs = pair()
    amsf, upstream = amsf_schedule_free(ours), schedule_free(theirs.parameters())
    fit(ours, amsf, STEPS, scheduler=in_flight(amsf))
    fit(theirs, upstream, STEPS, scheduler=in_flight(upstream))
    assert_same_average(ours, amsf, theirs, upstream, FP64)


def test_schedule_free_counts_steps_per_group_as_upstream_does() -> None:
    ours, theirs = pair()
    amsf, upstream = amsf_schedule_free(ours), schedule_free(theirs.parameters())
    fit(ours, amsf, STEPS, before_step=hide_gradients(ours))
    fit(theirs, upstream, STEPS, before_step=hide_gradients(theirs))
    assert_same_average(ours, amsf, theirs, upstream, FP64)


def test_schedule_free_counts_steps_of_a_group_without_any_gradient() -> None:
    """The whole second group goes without gradients at first, and in every other step."""

    def without(model: Transformer) -> Callable[[int], None]:
        def before_step(step: int) -> None:
            for param in model.parameters():
                if param.dim() < 2 and (step < 10 or step % 2):
                    param.grad = None

        return before_step

    ours, theirs = pair()
    amsf = amsf_schedule_free(two_groups(ours), r=1.0)
    upstream = schedule_free(without_names(two_groups(theirs)), r=1.0)
    fit(ours, amsf, STEPS, before_step=without(ours))
    fit(theirs, upstream, STEPS, before_step=without(theirs))
    assert_same_average(ours, amsf, theirs, upstream, FP64)


def test_a_learning_rate_of_zero_from_the_start_moves_nothing() -> None:
    ours, before = pair()
    amsf = amsf_schedule_free(ours, lr=0.0)
    fit(ours, amsf, 3)
    assert_close(ours, before, 0.0)
    amsf.eval()
    assert_close(ours, before, 0.0)


# adam_mini.Adam_mini ----------------------------------------------------------------------------


def amsf_mini(params: Any, **options: Any) -> AMSF:
    """Upstream never decays norms and biases, which here are what is not a matrix."""
    options = {**BASE, "averaging": "ema", "decay": "matrices", **options}
    return AMSF(params, blocks="adam_mini", **options)


def mini(model: Transformer, **options: Any) -> Adam_mini:
    shape = model.shape
    return Adam_mini(
        list(model.named_parameters()),
        **{**BASE, **options},
        dim=shape.dim,
        n_heads=shape.heads,
        n_kv_heads=shape.kv_heads,
        verbose=False,
    )


@DTYPES
def test_ema_over_blocks_is_adam_mini(
    dtype: torch.dtype, tolerance: float, eps: float, leave_out: tuple[str, ...]
) -> None:
    ours, theirs = pair(Shape(layers=2), dtype)
    fit(ours, amsf_mini(ours, eps=eps), STEPS)
    fit(theirs, mini(theirs, eps=eps), STEPS)
    assert_close(ours, theirs, tolerance, leave_out)


@ADAM_OPTIONS
def test_ema_over_blocks_is_adam_mini_with_every_option(options: dict[str, Any]) -> None:
    ours, theirs = pair()
    fit(ours, amsf_mini(ours, **options), STEPS)
    fit(theirs, mini(theirs, **options), STEPS)
    assert_close(ours, theirs, FP64)


def test_ema_over_blocks_is_adam_mini_when_groups_say_what_decays() -> None:
    ours, theirs = pair()
    groups = [
        {
            "params": [(n, p) for n, p in ours.named_parameters() if is_matrix == (p.dim() >= 2)],
            "weight_decay": 0.1 if is_matrix else 0.0,
        }
        for is_matrix in (True, False)
    ]
    options = {"averaging": "ema", "blocks": "adam_mini", "head_dim": ours.shape.head_dim}
    fit(ours, AMSF(groups, **{**BASE, **options}), STEPS)
    fit(theirs, mini(theirs), STEPS)
    assert_close(ours, theirs, FP64)


def test_ema_over_blocks_is_adam_mini_under_a_scheduler_and_without_some_gradients() -> None:
    ours, theirs = pair()
    amsf, upstream = amsf_mini(ours), mini(theirs)
    fit(ours, amsf, STEPS, scheduler=in_flight(amsf), before_step=hide_gradients(ours))
    fit(theirs, upstream, STEPS, scheduler=in_flight(upstream), before_step=hide_gradients(theirs))
    assert_close(ours, theirs, FP64)


def test_block_moments_are_those_of_adam_mini() -> None:
    ours, theirs = pair()
    amsf, upstream = amsf_mini(ours), mini(theirs)
    fit(ours, amsf, STEPS)
    fit(theirs, upstream, STEPS)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        state = upstream.state[other]
        moment = (state["vmean"] if "vmean" in state else state["v"]).flatten()
        assert_close({name: amsf.state[mine]["exp_avg_sq"].flatten()}, {name: moment}, FP64)


def test_where_adam_mini_cuts_through_heads_we_follow_its_paper() -> None:
    """Upstream takes dim * dim / n_heads numbers for a head, wrong when head_dim != dim / heads.

    Here it cuts every head of 16 rows in two. The paper has one block per head; so have we.
    """
    ours, theirs = pair(WIDE_HEADS)
    amsf, upstream = amsf_mini(ours), mini(theirs)
    fit(ours, amsf, STEPS)
    fit(theirs, upstream, 1)
    query = "model.layers.0.self_attn.q_proj.weight"
    assert upstream.state[theirs.get_parameter(query)]["vmean"].numel() == 2 * WIDE_HEADS.heads
    assert amsf.state[ours.get_parameter(query)]["exp_avg_sq"].numel() == WIDE_HEADS.heads

    by_paper = Transformer(WIDE_HEADS)
    options = {**BASE, "decay": "matrices"}
    reference = AdamMiniReference(by_paper.named_parameters(), block_numels(by_paper), **options)
    fit(by_paper, reference, STEPS)
    assert_close(ours, by_paper, FP64)


# AMSF: Schedule-Free over Adam-mini's blocks ----------------------------------------------------


def amsf(params: Any, **options: Any) -> AMSF:
    return AMSF(params, blocks="adam_mini", **{**BASE, **options})


def reference_of(model: Transformer, **options: Any) -> ScheduleFreeReference:
    options = {**BASE, **options}
    return ScheduleFreeReference(model.named_parameters(), block_numels(model), **options)


def assert_same_points(
    ours: Transformer,
    optimizer: AMSF,
    theirs: Transformer,
    reference: ScheduleFreeReference,
    tolerance: float,
    leave_out: tuple[str, ...] = NO_TRUE_GRADIENT,
) -> None:
    """y, x and z."""
    beta1 = optimizer.param_groups[0]["betas"][0]
    assert_close(ours, theirs, tolerance, leave_out)
    z = {n: p.detach() - beta1 * optimizer.state[p]["gap"] for n, p in ours.named_parameters()}
    assert_close(z, reference.z, tolerance, leave_out)
    optimizer.eval()
    assert_close(ours, dict(reference.x), tolerance, leave_out)
    optimizer.train()


@DTYPES
@SHAPES
def test_schedule_free_over_blocks_is_the_paper(
    shape: Shape, dtype: torch.dtype, tolerance: float, eps: float, leave_out: tuple[str, ...]
) -> None:
    ours, theirs = pair(shape, dtype)
    optimizer, reference = amsf(ours, eps=eps), reference_of(theirs, eps=eps)
    fit(ours, optimizer, STEPS)
    fit(theirs, reference, STEPS)
    assert_same_points(ours, optimizer, theirs, reference, tolerance, leave_out)


@FREE_COMBINATIONS
def test_schedule_free_over_blocks_is_the_paper_with_every_option(options: dict[str, Any]) -> None:
    ours, theirs = pair()
    optimizer, reference = amsf(ours, **options), reference_of(theirs, **options)
    fit(ours, optimizer, STEPS)
    fit(theirs, reference, STEPS)
    assert_same_points(ours, optimizer, theirs, reference, FP64)


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_schedule_free_over_blocks_is_the_paper_without_some_gradients(decay: str) -> None:
    ours, theirs = pair()
    optimizer, reference = amsf(ours, decay=decay), reference_of(theirs, decay=decay)
    fit(ours, optimizer, STEPS, before_step=hide_gradients(ours))
    fit(theirs, reference, STEPS, before_step=hide_gradients(theirs))
    assert_same_points(ours, optimizer, theirs, reference, FP64)


def test_auto_blocks_are_adam_mini_s_but_for_vectors() -> None:
    """blocks="auto" gives every number of a norm its own moment; the rest is the same."""
    ours, theirs = pair()
    blocks = {
        name: 1 if theirs.get_parameter(name).dim() < 2 else numel
        for name, numel in block_numels(theirs).items()
    }
    optimizer = AMSF(ours, **BASE)
    reference = ScheduleFreeReference(theirs.named_parameters(), blocks, **BASE)
    fit(ours, optimizer, STEPS)
    fit(theirs, reference, STEPS)
    assert_same_points(ours, optimizer, theirs, reference, FP64)


# The references themselves ----------------------------------------------------------------------


@FREE_COMBINATIONS
def test_the_reference_over_elements_is_adamw_schedule_free(options: dict[str, Any]) -> None:
    model, theirs = pair()
    options = {**BASE, **options}
    reference = ScheduleFreeReference(model.named_parameters(), **options)
    upstream = schedule_free(theirs.parameters(), **options)
    fit(model, reference, STEPS, before_step=hide_gradients(model))
    fit(theirs, upstream, STEPS, before_step=hide_gradients(theirs))
    assert_close(model, theirs, FP64)
    upstream.eval()
    assert_close(dict(reference.x), theirs, FP64)


def test_the_reference_finds_the_block_moments_of_adam_mini() -> None:
    """Adam-mini trains; the reference's recurrence is fed with the gradients that it saw."""
    model = Transformer(Shape(layers=2))
    upstream, sizes = mini(model), block_numels(model)
    moments = {name: torch.zeros(()) for name in sizes}
    beta2 = BASE["betas"][1]

    def watch(step: int) -> None:
        for name, param in model.named_parameters():
            mean = mean_square(param.grad, sizes[name])
            moments[name] = beta2 * moments[name] + (1 - beta2) * mean

    fit(model, upstream, STEPS, before_step=watch)
    for name, param in model.named_parameters():
        state = upstream.state[param]
        theirs = (state["vmean"] if "vmean" in state else state["v"]).flatten()
        assert_close({name: moments[name].flatten()}, {name: theirs}, FP64)


def test_the_reference_of_adam_mini_is_adam_mini() -> None:
    model, theirs = pair(Shape(layers=2))
    options = {**BASE, "decay": "matrices"}
    reference = AdamMiniReference(model.named_parameters(), block_numels(model), **options)
    fit(model, reference, STEPS, before_step=hide_gradients(model))
    fit(theirs, mini(theirs), STEPS, before_step=hide_gradients(theirs))
    assert_close(model, theirs, FP64)
