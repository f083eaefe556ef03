"""Who comes from AdamW, schedulefree or adam-mini goes on where they stopped, and can go back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adam_mini import Adam_mini
from layouts import (
    fsdp1,
    fsdp2,
    moments,
    relative_error,
    tensor_parallel_fsdp2,
    weights,
    whole,
)
from models import Little, Transformer, assert_same_bits, everything, fit, largest_difference
from ranks import run_ranks
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

from amsf_dist import AMSF
from amsf_dist.checkpoint import export_state_dict, import_state_dict

BEFORE, AFTER = 10, 20
FP64 = 1e-10
BASE: dict[str, Any] = {"lr": 5e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
# Under softmax it has no true gradient. One block per tensor divides the noise that arrives by its
# own size, and so makes full steps of it.
NOISE = "k_proj.bias"


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), **{**BASE, **options})


def schedulefree(model: nn.Module, **options: Any) -> AdamWScheduleFree:
    optimizer = AdamWScheduleFree(model.parameters(), **{**BASE, **options})
    optimizer.train()
    return optimizer


def adam_mini(model: Transformer) -> Adam_mini:
    shape = model.shape
    return Adam_mini(
        list(model.named_parameters()),
        **BASE,
        dim=shape.dim,
        n_heads=shape.heads,
        n_kv_heads=shape.kv_heads,
        verbose=False,
    )


def hide_some(model: nn.Module) -> Callable[[int], None]:
    """One parameter without gradients at first, one for good."""

    def before_step(step: int) -> None:
        for name, param in model.named_parameters():
            if name.endswith("q_proj.bias") or (name.endswith("v_proj.weight") and step < 5):
                param.grad = None

    return before_step


def saved(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def assert_close(ours: Any, theirs: Any, tolerance: float = FP64) -> None:
    error, name = largest_difference(ours, theirs)
    assert error <= tolerance, f"{name} differs by {error:.1e}"


def blocks_of(optimizer: AMSF) -> dict[str, Any]:
    """Name -> (block_numel, order) of every parameter."""
    return {
        holding.name: holding.layout.pieces[0].part.blocks
        for holding in optimizer._ready().holdings
    }


def by_blocks(value: Tensor, blocks: Any) -> Tensor:
    """[num_blocks, block_numel]."""
    line = value if blocks.order is None else value.permute(blocks.order)
    return line.reshape(-1, blocks.block_numel)


# Going on ---------------------------------------------------------------------------------------


def test_adamw_goes_on_as_ema_over_elements() -> None:
    theirs, ours = Transformer(), Transformer(seed=1)
    upstream = adamw(theirs)
    fit(theirs, upstream, BEFORE, before_step=hide_some(theirs))
    start = saved(theirs, upstream)
    fit(theirs, upstream, range(BEFORE, BEFORE + AFTER), before_step=hide_some(theirs))

    ours.load_state_dict(start["model"])
    optimizer = AMSF(ours, averaging="ema", blocks="element", **BASE)
    assert import_state_dict(optimizer, start["optimizer"]) == "adamw"
    fit(ours, optimizer, range(BEFORE, BEFORE + AFTER), before_step=hide_some(ours))
    assert_close(ours, theirs)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_schedulefree_goes_on_as_schedule_free_over_elements(mode: str) -> None:
    options: dict[str, Any] = {"warmup_steps": 15, "r": 1.0}
    theirs, ours = Transformer(), Transformer(seed=1)
    upstream = schedulefree(theirs, **options)
    fit(theirs, upstream, BEFORE, before_step=hide_some(theirs))
    getattr(upstream, mode)()
    start = saved(theirs, upstream)
    upstream.train()
    fit(theirs, upstream, range(BEFORE, BEFORE + AFTER), before_step=hide_some(theirs))

    ours.load_state_dict(start["model"])
    optimizer = AMSF(ours, blocks="element", **BASE, **options)
    assert import_state_dict(optimizer, start["optimizer"]) == "schedulefree"
    if mode == "eval":
        with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
            fit(ours, optimizer, 1)
        ours.zero_grad()
    optimizer.train()
    fit(ours, optimizer, range(BEFORE, BEFORE + AFTER), before_step=hide_some(ours))
    assert_close(ours, theirs)
    optimizer.eval()
    upstream.eval()
    assert_close(ours, theirs)


def test_adam_mini_goes_on_as_ema_over_its_blocks() -> None:
    theirs, ours = Transformer(), Transformer(seed=1)
    upstream = adam_mini(theirs)
    fit(theirs, upstream, BEFORE, before_step=hide_some(theirs))
    start = saved(theirs, upstream)
    fit(theirs, upstream, range(BEFORE, BEFORE + AFTER), before_step=hide_some(theirs))

    ours.load_state_dict(start["model"])
    optimizer = AMSF(ours, averaging="ema", blocks="adam_mini", decay="matrices", **BASE)
    assert import_state_dict(optimizer, start["optimizer"]) == "adam_mini"
    fit(ours, optimizer, range(BEFORE, BEFORE + AFTER), before_step=hide_some(ours))
    assert_close(ours, theirs)


def test_adamw_goes_on_after_ema_over_elements() -> None:
    ours, theirs = Transformer(), Transformer(seed=1)
    optimizer = AMSF(ours, averaging="ema", blocks="element", **BASE)
    fit(ours, optimizer, BEFORE, before_step=hide_some(ours))
    exported = export_state_dict(optimizer)
    theirs.load_state_dict(ours.state_dict())
    upstream = torch.optim.AdamW(theirs.named_parameters(), lr=1.0)  # options come with the state
    upstream.load_state_dict(exported)
    fit(ours, optimizer, range(BEFORE, BEFORE + AFTER), before_step=hide_some(ours))
    fit(theirs, upstream, range(BEFORE, BEFORE + AFTER), before_step=hide_some(theirs))
    assert_close(ours, theirs)


@pytest.mark.parametrize("blocks", ["auto", "adam_mini", "row", "tensor", "element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_and_imported_again_is_the_same(blocks: str, dtype: torch.dtype) -> None:
    ours, again = Transformer(dtype=dtype), Transformer(dtype=dtype)
    # AdamW's layout has no error bits of 16-bit weights
    options = {"averaging": "ema", "blocks": blocks, "weight_storage": "native", **BASE}
    optimizer = AMSF(ours, **options)
    fit(ours, optimizer, BEFORE)
    resumed = AMSF(again, **options)
    import_state_dict(resumed, export_state_dict(optimizer))
    assert_same_bits(resumed.state_dict()["state"], optimizer.state_dict()["state"])


# What is kept and what starts anew ----------------------------------------------------------------


class Transposed(Little):
    """With a weight that has its outputs on dim 1."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype)
        self.mix = nn.ConvTranspose1d(6, 6, 3, padding=1, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed_tokens(tokens))
        return self.up_proj(x + self.mix(x.transpose(-1, -2)).transpose(-1, -2))


@pytest.mark.parametrize("blocks", ["adam_mini", "row", "tensor"])
@pytest.mark.parametrize("averaging", ["ema", "schedule_free"])
def test_block_moments_are_the_means_of_adamw_s(averaging: str, blocks: str) -> None:
    theirs = Transposed()
    upstream = adamw(theirs)
    fit(theirs, upstream, BEFORE)
    ours = copy.deepcopy(theirs)
    optimizer = AMSF(ours, averaging=averaging, blocks=blocks, head_dim=None, **BASE)
    import_state_dict(optimizer, saved(theirs, upstream)["optimizer"])
    cut = blocks_of(optimizer)
    assert cut["mix.weight"].order is not None or blocks == "tensor"
    for (name, param), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        means = by_blocks(upstream.state[other]["exp_avg_sq"], cut[name]).mean(1)
        state = optimizer.state[param]
        torch.testing.assert_close(state["exp_avg_sq"].flatten(), means, rtol=1e-12, atol=0.0)
        assert state["step"] == BEFORE
        if averaging == "ema":
            assert torch.equal(state["exp_avg"], upstream.state[other]["exp_avg"])
        else:
            assert not state["gap"].any() and state["weight_sum"] == 0.0


def test_block_moments_of_adam_mini_come_through_unchanged_where_the_blocks_are_the_same() -> None:
    theirs = Transformer(dtype=torch.float32)
    upstream = adam_mini(theirs)
    fit(theirs, upstream, BEFORE)
    ours = copy.deepcopy(theirs)
    optimizer = AMSF(ours, averaging="ema", blocks="adam_mini", **BASE)
    import_state_dict(optimizer, upstream.state_dict())
    for param, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        state = upstream.state[other]
        moment = (state["vmean"] if "vmean" in state else state["v"]).flatten()
        assert torch.equal(optimizer.state[param]["exp_avg_sq"].flatten(), moment)


@pytest.mark.parametrize("origin", [adamw, adam_mini])
def test_averaging_starts_at_the_weights_where_they_were_not_averaged(
    origin: Callable[[Any], Any],
) -> None:
    theirs = Transformer()
    upstream = origin(theirs)
    fit(theirs, upstream, BEFORE)
    ours = copy.deepcopy(theirs)
    optimizer = AMSF(ours, blocks="adam_mini", **BASE)
    import_state_dict(optimizer, saved(theirs, upstream)["optimizer"])
    average = optimizer.averaged_state_dict(ours)
    assert_same_bits({n: average[n] for n, _ in theirs.named_parameters()}, weights(theirs))

    fit(ours, optimizer, [BEFORE])  # the first iterate is the whole average, as in a fresh run
    assert all(not state["gap"].any() for state in optimizer.state.values())
    losses = fit(ours, optimizer, range(BEFORE, BEFORE + AFTER))
    assert losses[-1] < losses[0]


def test_another_beta2_keeps_the_corrected_moment() -> None:
    """After few steps v is mostly its bias; beta2 = 0.999 and 0.9 have biases of 1 % and 65 %."""
    theirs = Transformer()
    upstream = adamw(theirs, betas=(0.8, 0.999))
    fit(theirs, upstream, BEFORE)
    ours = copy.deepcopy(theirs)
    options = {**BASE, "betas": (0.9, 0.9)}
    optimizer = AMSF(ours, averaging="ema", blocks="element", **options)
    import_state_dict(optimizer, saved(theirs, upstream)["optimizer"])
    for param, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine, before = optimizer.state[param], upstream.state[other]
        for key, ours_beta, their_beta in (("exp_avg", 0.9, 0.8), ("exp_avg_sq", 0.9, 0.999)):
            corrected = mine[key] / (1 - ours_beta**BEFORE)
            expected = before[key] / (1 - their_beta**BEFORE)
            torch.testing.assert_close(corrected, expected, rtol=1e-12, atol=0.0)


def test_ema_from_schedulefree_starts_at_the_average_without_momentum() -> None:
    theirs = Transformer()
    upstream = schedulefree(theirs)
    fit(theirs, upstream, BEFORE)
    upstream.eval()
    ours = copy.deepcopy(theirs)
    optimizer = AMSF(ours, averaging="ema", blocks="element", **BASE)
    import_state_dict(optimizer, saved(theirs, upstream)["optimizer"])
    for param, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        state = optimizer.state[param]
        assert not state["exp_avg"].any() and state["step"] == BEFORE
        assert torch.equal(state["exp_avg_sq"], upstream.state[other]["exp_avg_sq"])
    losses = fit(ours, optimizer, range(BEFORE, BEFORE + AFTER))
    assert losses[-1] < losses[0]


def test_adamw_goes_on_from_the_average_of_schedule_free() -> None:
    ours, theirs = Transformer(), Transformer(seed=1)
    optimizer = AMSF(ours, blocks="adam_mini", warmup_steps=3, **BASE)
    fit(ours, optimizer, BEFORE)
    before = everything(ours, optimizer)
    exported = export_state_dict(optimizer)
    assert_same_bits(everything(ours, optimizer), before)
    theirs.load_state_dict(optimizer.averaged_state_dict(ours), strict=False)
    upstream = adamw(theirs)
    upstream.load_state_dict(exported)
    cut = blocks_of(optimizer)
    for (name, param), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        state = upstream.state[other]
        assert state["step"] == BEFORE and not state["exp_avg"].any()
        spread = by_blocks(state["exp_avg_sq"], cut[name])
        mine = optimizer.state[param]["exp_avg_sq"].view(-1, 1)
        assert torch.equal(spread, mine.expand_as(spread))
    losses = fit(theirs, upstream, range(BEFORE, BEFORE + AFTER))
    assert losses[-1] < losses[0]


def test_what_was_there_before_an_import_is_gone() -> None:
    """State, copies kept in eval mode, and parameters of which the checkpoint knows nothing."""
    theirs = Transformer()
    upstream = adamw(theirs)
    fit(theirs, upstream, BEFORE, before_step=hide_some(theirs))
    taken = []
    for steps in (0, 4):
        ours = Transformer(seed=1)
        optimizer = AMSF(ours, blocks="adam_mini", **BASE)
        fit(ours, optimizer, steps)
        optimizer.eval()
        ours.load_state_dict(theirs.state_dict())
        import_state_dict(optimizer, saved(theirs, upstream)["optimizer"])
        fit(ours, optimizer, range(BEFORE, BEFORE + 3))
        taken.append(everything(ours, optimizer))
    assert_same_bits(*taken)


def test_options_stay_those_of_the_new_optimizer() -> None:
    theirs = Little()
    upstream = adamw(theirs, lr=0.5)
    fit(theirs, upstream, 3)
    optimizer = AMSF(Little(), lr=1e-3, weight_decay=0.0, betas=(0.95, 0.99))
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    import_state_dict(optimizer, upstream.state_dict())
    assert optimizer.state_dict()["param_groups"] == before


def test_weight_decay_is_exported_as_adamw_means_it(caplog: pytest.LogCaptureFixture) -> None:
    def exported(**options: Any) -> float:
        optimizer = AMSF(Little(), lr=0.02, **options)
        return export_state_dict(optimizer)["param_groups"][0]["weight_decay"]

    assert exported(weight_decay=0.1) == 0.1
    assert exported(weight_decay=0.001, decouple_lr=True) == 0.001 / 0.02
    assert not caplog.records
    assert exported(weight_decay=0.1, decay="matrices") == 0.1
    assert "will also decay the vectors" in caplog.text
    model = Little()
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() < 2) == vectors]}
        for vectors in (False, True)
    ]
    optimizer = AMSF(groups, weight_decay=0.1, decay="matrices")
    decays = [g["weight_decay"] for g in export_state_dict(optimizer)["param_groups"]]
    assert decays == [0.1, 0.0]


# Names ------------------------------------------------------------------------------------------


def test_parameters_are_matched_by_name_in_any_order_and_grouping() -> None:
    theirs, ours = Little(), Little()
    named = dict(theirs.named_parameters())
    upstream = torch.optim.AdamW(
        [
            {"params": [(f"module.{n}", p) for n, p in named.items() if p.dim() < 2]},
            {"params": [(f"module.{n}", p) for n, p in named.items() if p.dim() >= 2]},
        ]
    )
    fit(theirs, upstream, 3)
    optimizer = AMSF(ours, averaging="ema", blocks="element")
    import_state_dict(optimizer, upstream.state_dict())
    for name, param in ours.named_parameters():
        assert torch.equal(
            optimizer.state[param]["exp_avg"], upstream.state[named[name]]["exp_avg"]
        )


def test_names_may_be_given_where_a_checkpoint_has_none() -> None:
    theirs, ours = Little(), Little()
    named = dict(reversed(list(theirs.named_parameters())))
    upstream = torch.optim.AdamW(list(named.values()))
    fit(theirs, upstream, 3)
    optimizer = AMSF(ours, averaging="ema", blocks="element")
    import_state_dict(optimizer, upstream.state_dict(), names=list(named))
    for name, param in ours.named_parameters():
        assert torch.equal(
            optimizer.state[param]["exp_avg"], upstream.state[named[name]]["exp_avg"]
        )


def test_state_keyed_by_names_as_torch_s_distributed_checkpoints_have_it() -> None:
    theirs, ours = Little(), Little()
    upstream = torch.optim.AdamW(theirs.parameters())
    fit(theirs, upstream, 3)
    optimizer = AMSF(reversed(list(ours.named_parameters())), averaging="ema", blocks="element")
    import_state_dict(optimizer, get_optimizer_state_dict(theirs, upstream))
    for param, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(optimizer.state[param]["exp_avg"], upstream.state[other]["exp_avg"])


def test_parameters_that_are_no_longer_trained_are_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    theirs, ours = Little(), Little()
    upstream = torch.optim.AdamW(theirs.named_parameters())
    fit(theirs, upstream, 3)
    ours.embed_tokens.requires_grad_(False)
    optimizer = AMSF(ours)
    with caplog.at_level(logging.WARNING):
        import_state_dict(optimizer, upstream.state_dict())
    assert "1 parameters" in caplog.text and "embed_tokens.weight" in caplog.text


# Refusals ---------------------------------------------------------------------------------------


def of_adamw(**options: Any) -> dict[str, Any]:
    model = Little()
    optimizer = torch.optim.AdamW(model.named_parameters(), **options)
    fit(model, optimizer, 3)
    return optimizer.state_dict()


def of_schedulefree(mode: str = "train", **options: Any) -> dict[str, Any]:
    model = Little()
    optimizer = schedulefree(model, **options)
    fit(model, optimizer, 3)
    getattr(optimizer, mode)()
    return optimizer.state_dict()


def changed(state_dict: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    change(state_dict)
    return state_dict


REFUSED: list[tuple[Callable[[], Any], dict[str, Any], list[str]]] = [
    (lambda: {"model": {}}, {}, ["'param_groups'", "optimizer's part"]),
    (lambda: of_adamw()["state"], {}, ["'param_groups'", "optimizer's part"]),
    (lambda: AMSF(Little()).state_dict(), {}, ["AMSF's own", "load_state_dict"]),
    (lambda: torch.optim.AdamW(Little().parameters()).state_dict(), {}, ["no state yet"]),
    (
        lambda: changed(of_adamw(), lambda s: s["state"][0].pop("exp_avg")),
        {},
        ["'exp_avg_sq'", "none of 'adamw'"],
    ),
    (
        lambda: changed(of_adamw(), lambda s: s["state"][2].pop("exp_avg_sq")),
        {},
        ["norm.bias", "without 'exp_avg_sq'"],
    ),
    (
        lambda: changed(of_adamw(), lambda s: s["state"][2].update(exp_avg=3.0)),
        {},
        ["norm.bias", "'exp_avg'", "tensor", "float"],
    ),
    (
        lambda: changed(of_adamw(), lambda s: s["state"][4].update(exp_avg_sq=torch.ones(11))),
        {},
        ["up_proj.bias", "'exp_avg_sq'", "(11,)", "(10,)"],
    ),
    (
        lambda: changed(of_adamw(), lambda s: s["state"][4].update(exp_avg=torch.ones(5))),
        {},
        ["up_proj.bias", "'exp_avg'", "(5,)", "(10,)"],
    ),
    (
        lambda: changed(
            of_adamw(), lambda s: s["param_groups"][0]["param_names"].__setitem__(4, "down.bias")
        ),
        {},
        ["'up_proj.bias'", "'embed_tokens.weight'"],
    ),
    (
        lambda: changed(
            of_adamw(), lambda s: s["param_groups"][0]["param_names"].__setitem__(4, "norm.bias")
        ),
        {},
        ["same name"],
    ),
    (lambda: of_adamw(amsgrad=True), {}, ["amsgrad"]),
    (of_adamw, {"source": "adam"}, ["'adam'", "'adamw'", "'schedulefree'", "'adam_mini'"]),
    (of_adamw, {"source": "schedulefree"}, ["'schedulefree'", "'adamw'"]),
    (of_adamw, {"names": ["a", "b"]}, ["2 names", "5 saved parameters"]),
    (
        lambda: changed(of_schedulefree(), lambda s: s["param_groups"][0].pop("weight_sum")),
        {},
        ["group 0", "'weight_sum'"],
    ),
    (lambda: of_schedulefree(betas=(0.8, 0.95)), {}, ["beta1=0.8", "beta1=0.9", "eval()"]),
]


@pytest.mark.parametrize(("make", "options", "says"), REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    make: Callable[[], Any], options: dict[str, Any], says: list[str]
) -> None:
    model = Little()
    optimizer = AMSF(model, **BASE)
    fit(model, optimizer, 2)
    optimizer.eval()
    before = everything(model, optimizer)
    with pytest.raises(ValueError) as raised:
        import_state_dict(optimizer, make(), **options)
    message = str(raised.value)
    assert "\n" not in message
    for part in says:
        assert part in message
    assert_same_bits(everything(model, optimizer), before)


def test_ema_refuses_schedulefree_weights_that_are_not_the_average() -> None:
    model = Little()
    optimizer = AMSF(model, averaging="ema", **BASE)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=r"call eval\(\) of the schedulefree optimizer"):
        import_state_dict(optimizer, of_schedulefree())
    assert_same_bits(everything(model, optimizer), before)
    import_state_dict(optimizer, of_schedulefree("eval"))


def test_an_order_that_says_nothing_is_refused() -> None:
    """Two groups by shape against one in the model's order: a mix-up nobody would notice."""
    theirs, ours = Little(), Little()
    groups = [
        {"params": [p for p in theirs.parameters() if (p.dim() < 2) == vectors]}
        for vectors in (False, True)
    ]
    upstream = torch.optim.AdamW(groups)
    fit(theirs, upstream, 3)
    with pytest.raises(
        ValueError, match=r"\[2, 3\] parameters and this optimizer of \[5\].*names="
    ):
        import_state_dict(AMSF(ours), upstream.state_dict())


def test_only_adamw_s_layout_can_be_exported() -> None:
    with pytest.raises(ValueError, match="'adamw', got 'lion'"):
        export_state_dict(AMSF(Little()), target="lion")


# Shards -----------------------------------------------------------------------------------------

CASES = [
    (2, fsdp2, "schedule_free", "tensor", "adamw"),
    (2, fsdp2, "schedule_free", "adam_mini", "schedulefree"),
    (2, fsdp2, "ema", "adam_mini", "adam_mini"),
    (2, fsdp2, "ema", "element", "adamw"),
    (4, tensor_parallel_fsdp2, "schedule_free", "adam_mini", "adamw"),
]
ORIGINS: dict[str, Callable[[Any], Any]] = {
    "adamw": adamw,
    "schedulefree": schedulefree,
    "adam_mini": adam_mini,
}


def origin(name: str) -> Any:
    """A trained model and its upstream optimizer, the same on every rank."""
    model = Transformer()
    optimizer = ORIGINS[name](model)
    fit(model, optimizer, BEFORE)
    return model, optimizer


def taken_over(wrap: Any, averaging: str, blocks: str, name: str) -> Any:
    """Weights, moments and export after an import from whole tensors and some steps."""
    source, upstream = origin(name)
    model = Transformer()
    model.load_state_dict(source.state_dict())
    model = wrap(model) if wrap else model
    optimizer = AMSF(model, averaging=averaging, blocks=blocks, **BASE)
    names = [name for name, _ in source.named_parameters()]
    import_state_dict(optimizer, upstream.state_dict(), names=names)
    first = moments(model, optimizer)
    fit(model, optimizer, range(BEFORE, BEFORE + 5))
    sharded = export_state_dict(optimizer)["state"]
    exported = export_state_dict(optimizer, full=True)
    for number, entries in exported["state"].items():
        for key, value in entries.items():
            assert type(value) is Tensor and value.device.type == "cpu"
            assert torch.equal(whole(sharded[number][key]), value)
    flat = {f"{k} {names[n]}": v for n, s in exported["state"].items() for k, v in s.items()}
    return first, weights(model), moments(model, optimizer), flat


@pytest.mark.parametrize(("world_size", "wrap", "averaging", "blocks", "name"), CASES)
def test_whole_tensors_go_into_shards_and_come_out_again(
    world_size: int, wrap: Callable[[Any], Any], averaging: str, blocks: str, name: str
) -> None:
    expected = taken_over(None, averaging, blocks, name)
    for ours in run_ranks(world_size, taken_over, wrap, averaging, blocks, name):
        for mine, one_process in zip(ours, expected, strict=True):
            error, where = relative_error(mine, one_process, NOISE)
            assert error <= FP64, f"{where} differs by {error:.1e}"


def sharded_upstream(name: str) -> Any:
    """Upstream on FSDP2, DTensor state, goes on beside AMSF; AdamW also takes it back."""
    theirs, ours = fsdp2(Transformer()), fsdp2(Transformer(seed=1))
    upstream = ORIGINS[name](theirs)
    fit(theirs, upstream, BEFORE)
    ours.load_state_dict(theirs.state_dict())
    averaging = "schedule_free" if name == "schedulefree" else "ema"
    optimizer = AMSF(ours, averaging=averaging, blocks="element", **BASE)
    import_state_dict(optimizer, upstream.state_dict())
    fit(ours, optimizer, range(BEFORE, BEFORE + 5))
    fit(theirs, upstream, range(BEFORE, BEFORE + 5))
    results = [(weights(ours), weights(theirs))]
    if name == "adamw":
        upstream.load_state_dict(export_state_dict(optimizer))
        fit(ours, optimizer, range(20, 25))
        fit(theirs, upstream, range(20, 25))
        results.append((weights(ours), weights(theirs)))
    return results


@pytest.mark.parametrize("name", ["adamw", "schedulefree"])
def test_an_upstream_optimizer_on_shards_goes_on(name: str) -> None:
    for results in run_ranks(2, sharded_upstream, name):
        for ours, theirs in results:
            error, where = relative_error(ours, theirs)
            assert error <= FP64, f"{where} differs by {error:.1e}"


def fsdp1_upstream(original: bool) -> Any:
    """From one process into FSDP1, through FSDP's own function, and back."""
    source, upstream = origin("adamw")
    model = Transformer()
    model.load_state_dict(source.state_dict())
    model = fsdp1("FULL_SHARD", original)(model)
    optimizer = AMSF(model, averaging="ema", blocks="adam_mini", **BASE)
    whole_state = get_optimizer_state_dict(source, upstream)
    local = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, whole_state)
    import_state_dict(optimizer, local)
    exported = export_state_dict(optimizer)
    with pytest.raises(ValueError, match=r"FSDP\.optim_state_dict"):
        export_state_dict(optimizer, full=True)
    back = FullyShardedDataParallel.optim_state_dict(model, optimizer, optim_state_dict=exported)
    return {
        f"{name} {key}": whole(value)
        for name, entries in back["state"].items()
        for key, value in entries.items()
        # torch 2.13 gathers all states of use_orig_params=True into one buffer without copying, on
        # a CPU: of exp_avg and exp_avg_sq (of any optimizer) only the last comes out right
        if not (original and key == "exp_avg")
    }


@pytest.mark.parametrize("original", [True, False])
def test_fsdp1_takes_over_and_gives_back(original: bool) -> None:
    source, upstream = origin("adamw")
    optimizer = AMSF(source, averaging="ema", blocks="adam_mini", **BASE)
    import_state_dict(optimizer, upstream.state_dict())
    exported = export_state_dict(optimizer)
    names = exported["param_groups"][0]["param_names"]
    expected = {
        f"{names[number]} {key}": value
        for number, entries in exported["state"].items()
        for key, value in entries.items()
    }
    for ours in run_ranks(2, fsdp1_upstream, original):
        error, where = relative_error(ours, {name: expected[name] for name in ours})
        assert len(ours) == (2 if original else 3) * len(names)
        assert error <= FP64, f"{where} differs by {error:.1e}"
