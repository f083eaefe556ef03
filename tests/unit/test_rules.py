"""A rule is one small module: defined here, it has state, modes, groups and checkpoints at once.

Three published updates, none of which the package ships, each against its own upstream: Lion;
SGD with momentum whose evaluation weights are a moving average (two lines of state); and
Schedule-Free SGD. Nothing of the package is touched but the table of rules.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import optimi
import pytest
import schedulefree
import torch
from models import Little, assert_same_bits, everything, fit, largest_difference
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from amsf_dist import AMSF
from amsf_dist.rules import RULES

LR, DECAY = 0.02, 0.1


class Step(NamedTuple):
    """What all three need of a step."""

    lr: Any
    beta1: float
    beta2: float
    decay: float


class Lion:
    """arXiv 2302.06675."""

    name = "lion"
    lines = ("exp_avg",)
    counters = ("step",)
    averaged = False
    ticks_without_gradient = False

    def advance(
        self, counters: Mapping[str, Tensor], tick: Tensor, group: Mapping[str, Any]
    ) -> Step:
        lr = group["lr"] + 0.0 * counters["step"].add_(tick)
        return Step(lr, *group["betas"], group["weight_decay"])

    def block_scale(self, exp_avg_sq: Tensor, mean_sq: Tensor, c: Step) -> tuple[Tensor, Tensor]:
        return exp_avg_sq, torch.ones_like(exp_avg_sq)

    def move(
        self,
        weight: Tensor,
        grad: Tensor,
        scale: Tensor,
        lines: tuple[Tensor, ...],
        decays: bool,
        c: Step,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (exp_avg,) = lines
        update = (c.beta1 * exp_avg + (1.0 - c.beta1) * grad).sign()
        if decays:
            update = update + c.decay * weight
        return weight - c.lr * update, (c.beta2 * exp_avg + (1.0 - c.beta2) * grad,)

    def to_x(self, weight: Tensor, lines: tuple[Tensor, ...], group: Mapping[str, Any]) -> Tensor:
        return weight

    to_y = to_x


class AveragedSgd(Lion):
    """torch.optim.SGD(momentum=beta1); evaluation weights are an average with decay beta2."""

    name = "averaged_sgd"
    lines = ("momentum", "ahead")  # ahead = average - weight: zero at first, as lines are
    averaged = True

    def move(
        self,
        weight: Tensor,
        grad: Tensor,
        scale: Tensor,
        lines: tuple[Tensor, ...],
        decays: bool,
        c: Step,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        momentum, ahead = lines
        if decays:
            grad = grad + c.decay * weight
        momentum = c.beta1 * momentum + grad
        moved = weight - c.lr * momentum
        return moved, (momentum, c.beta2 * (weight + ahead - moved))

    def to_x(self, weight: Tensor, lines: tuple[Tensor, ...], group: Mapping[str, Any]) -> Tensor:
        return weight + lines[1]

    def to_y(self, weight: Tensor, lines: tuple[Tensor, ...], group: Mapping[str, Any]) -> Tensor:
        return weight - lines[1]


class _FreeStep(NamedTuple):
    lr: Any
    ckp1: Any
    beta1: float
    decay: float


class ScheduleFreeSgd:
    """schedulefree.SGDScheduleFree, kept as y and the gap x - z."""

    name = "schedule_free_sgd"
    lines = ("gap",)
    counters = ("step", "weight_sum")
    averaged = True
    ticks_without_gradient = True

    def advance(
        self, counters: Mapping[str, Tensor], tick: Tensor, group: Mapping[str, Any]
    ) -> _FreeStep:
        step = counters["step"].add_(tick)
        lr = group["lr"] * (step / max(group["warmup_steps"], 1)).clamp(max=1.0)
        weight = lr**2
        ckp1 = weight / counters["weight_sum"].add_(weight * tick)
        return _FreeStep(lr, ckp1, group["betas"][0], group["weight_decay"])

    def block_scale(
        self, exp_avg_sq: Tensor, mean_sq: Tensor, c: _FreeStep
    ) -> tuple[Tensor, Tensor]:
        return exp_avg_sq, torch.ones_like(exp_avg_sq)

    def move(
        self,
        weight: Tensor,
        grad: Tensor,
        scale: Tensor,
        lines: tuple[Tensor, ...],
        decays: bool,
        c: _FreeStep,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if decays:
            grad = grad + c.decay * weight
        gap = lines[0] + c.lr * grad
        weight = weight - (c.beta1 * c.ckp1) * gap - ((1.0 - c.beta1) * c.lr) * grad
        return weight, ((1.0 - c.ckp1) * gap,)

    def to_x(self, weight: Tensor, lines: tuple[Tensor, ...], group: Mapping[str, Any]) -> Tensor:
        return weight + (1.0 - group["betas"][0]) * lines[0]

    def to_y(self, weight: Tensor, lines: tuple[Tensor, ...], group: Mapping[str, Any]) -> Tensor:
        return weight - (1.0 - group["betas"][0]) * lines[0]


MINE = (Lion(), AveragedSgd(), ScheduleFreeSgd())
EVERY_RULE = pytest.mark.parametrize("name", [rule.name for rule in MINE])


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for rule in MINE:
        monkeypatch.setitem(RULES, rule.name, rule)
    yield


def assert_close(ours: Any, theirs: Any) -> None:
    error, name = largest_difference(ours, theirs)
    assert error < 1e-12, f"{name} differs by {error:.1e}"


def built(name: str, model: Little, **options: Any) -> AMSF:
    return AMSF(model, **{"averaging": name, "lr": LR, "weight_decay": DECAY, **options})


@pytest.mark.parametrize("blocks", ["auto", "element", "tensor"])
def test_lion_is_that_of_optimi(blocks: str) -> None:
    model, theirs = Little(torch.float64), Little(torch.float64)
    fit(model, built("lion", model, betas=(0.9, 0.99), blocks=blocks), 30)
    lion = optimi.Lion(
        theirs.parameters(), LR, betas=(0.9, 0.99), weight_decay=DECAY, triton=False, foreach=False
    )
    fit(theirs, lion, 30)
    assert_close(model, theirs)


def test_sgd_with_momentum_is_that_of_torch_and_its_average_is_torch_s() -> None:
    model, theirs = Little(torch.float64), Little(torch.float64)
    ours = built("averaged_sgd", model, betas=(0.8, 0.9))
    sgd = torch.optim.SGD(theirs.parameters(), lr=LR, momentum=0.8, weight_decay=DECAY)
    average = AveragedModel(theirs, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(theirs)  # the first update copies: the average starts at the start
    for step in range(30):
        fit(model, ours, [step])
        fit(theirs, sgd, [step])
        average.update_parameters(theirs)
    assert_close(model, theirs)
    with ours.averaged_parameters():
        assert_close(model, average.module)


def test_schedule_free_sgd_is_that_of_schedulefree() -> None:
    model, theirs = Little(torch.float64), Little(torch.float64)
    ours = built("schedule_free_sgd", model, warmup_steps=5)
    sgd = schedulefree.SGDScheduleFree(
        theirs.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY, warmup_steps=5
    )
    sgd.train()
    fit(model, ours, 30)
    fit(theirs, sgd, 30)
    assert_close(model, theirs)
    ours.eval()
    sgd.eval()
    assert_close(model, theirs)


@EVERY_RULE
def test_state_of_a_rule_is_its_lines_its_counters_and_the_moments(name: str) -> None:
    model = Little()
    optimizer, rule = built(name, model), RULES[name]
    for entries in optimizer.state_dict()["state"].values():
        assert set(entries) == {*rule.lines, *rule.counters, "exp_avg_sq"}
    assert set(rule.lines) < set(optimizer.memory())


@EVERY_RULE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_rule_resumes_where_it_was_saved(name: str, dtype: torch.dtype, mode: str) -> None:
    model, again = Little(dtype), Little(dtype, seed=1)
    optimizer, resumed = built(name, model), built(name, again)
    fit(model, optimizer, 4)
    getattr(optimizer, mode)()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer.train()
    fit(model, optimizer, range(4, 8))

    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    resumed.train()
    fit(again, resumed, range(4, 8))
    assert_same_bits(everything(again, resumed), everything(model, optimizer))


@EVERY_RULE
def test_modes_of_a_rule_come_back_bit_for_bit(name: str) -> None:
    model = Little()
    optimizer = built(name, model)
    fit(model, optimizer, 4)
    before = everything(model, optimizer)
    with optimizer.averaged_parameters():
        weights = [param.detach().clone() for param in model.parameters()]
    changed = [
        bool((now != then).any()) for now, then in zip(weights, model.parameters(), strict=True)
    ]
    assert set(changed) == {RULES[name].averaged}
    assert_same_bits(everything(model, optimizer), before)


@EVERY_RULE
def test_a_rule_skips_steps_that_are_not_finite(name: str) -> None:
    model = Little()
    optimizer = built(name, model)
    fit(model, optimizer, 2)
    before = everything(model, optimizer)

    def spoil(step: int) -> None:
        model.norm.bias.grad[0] = float("nan")

    fit(model, optimizer, [2], before_step=spoil)
    assert_same_bits(everything(model, optimizer), before)
    assert optimizer.skipped_steps == 1


@EVERY_RULE
def test_a_rule_works_beside_others_in_one_optimizer(name: str) -> None:
    model = Little()
    named = list(model.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:], "averaging": name}]
    optimizer = AMSF(groups, lr=LR)
    losses = fit(model, optimizer, 40)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert set(RULES[name].lines) <= set(optimizer.state[model.up_proj.weight])


def test_an_unknown_rule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'lion'.*did you mean 'lion'"):
        AMSF(Little(), averaging="lyon")
