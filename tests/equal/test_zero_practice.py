"""What people do with DeepSpeed: half precision, groups, frozen layers, zero.Init, other models."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import OPTIONS, SHAPES, loss_of, relative_error
from layouts import moments as plain_moments
from layouts import train as train_plain
from layouts import weights as plain_weights
from models import Transformer, assert_same_bits
from ranks import run_ranks
from torch import nn
from zero import CLIP, HEADS, config, counters, engine_of, everything, train, weights

from amsf_dist import AMSF

SHAPE = SHAPES["even"]
STEPS = 6
NOISE = "k_proj.bias"
ZERO_3 = {"stage": 3, "zero": {"sub_group_size": 500}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}


def transformer() -> Transformer:
    return Transformer(SHAPE, dtype=torch.float32)


# --- half precision ------------------------------------------------------------------------------

# What is not the optimizer's must not differ: ZeRO-3's own linear layer rounds biases in another
# place, the norm for clipping is added up in another order. Then nothing differs.
PLAIN_LINEAR = {"memory_efficient_linear": False}
CPU = {"device": "cpu"}
HALF: dict[str, dict[str, Any]] = {
    "0": {},
    "1": {"stage": 1},
    "1 fp32 sums": {"stage": 1, **FP32_SUMS},  # BF16_Optimizer
    "2": {"stage": 2},
    "2 fp32 sums": {"stage": 2, **FP32_SUMS},
    "2 offload": {"stage": 2, "zero": {"offload_optimizer": CPU}},
    "3": {"stage": 3, "zero": {"sub_group_size": 500, **PLAIN_LINEAR}},
    "3 offload": {
        "stage": 3,
        "zero": {"offload_optimizer": CPU, "offload_param": CPU, **PLAIN_LINEAR},
    },
}
SCALE = 128.0
HALF_TYPES = {
    "bf16": (torch.bfloat16, {"bf16": {"enabled": True}}),
    "fp16": (torch.float16, {"fp16": {"enabled": True, "loss_scale": SCALE}}),
}


def in_half(precision: str) -> Any:
    found = {}
    for name, settings in HALF.items():
        if precision == "fp16" and "fp32 sums" in name:
            continue
        section = {**settings, **HALF_TYPES[precision][1], "gradient_clipping": 0.0}
        engine = engine_of(transformer(), config(**section, amsf={"deterministic": True}))
        train(engine, SHAPE.vocab, range(STEPS))
        average = engine.optimizer.averaged_state_dict(engine.module)
        found[name] = {**everything(engine), "average": average}
        engine.destroy()
    return found


def half_by_hand(precision: str) -> dict[str, dict[str, torch.Tensor]]:
    """fp32 masters beside a model in half precision, one process, as papers describe it."""
    dtype = HALF_TYPES[precision][0]
    scale = SCALE if precision == "fp16" else 1.0
    model = transformer().to(dtype)
    masters = {name: p.detach().float().requires_grad_() for name, p in model.named_parameters()}
    optimizer = AMSF(masters.items(), head_dim=HEADS, deterministic=True, **OPTIONS)
    for step in range(STEPS):
        (loss_of(model, SHAPE.vocab, step).float() * scale).backward()
        for name, param in model.named_parameters():
            assert param.grad is not None
            masters[name].grad, param.grad = param.grad.float() / scale, None
        optimizer.step()
        for name, param in model.named_parameters():
            param.data.copy_(masters[name])
    found = {"y": plain_weights(model)}
    with optimizer.averaged_parameters():
        found["x"] = {name: master.detach().to(dtype) for name, master in masters.items()}
    return found


@pytest.mark.parametrize("precision", HALF_TYPES)
def test_half_precision_has_the_same_bits_at_every_stage(precision: str) -> None:
    for found in run_ranks(2, in_half, precision):
        for name, values in found.items():
            assert_same_bits(values, found["0"], name)
            for parameter, value in values["x"].items():
                assert torch.equal(values["average"][parameter], value)


@pytest.mark.parametrize("precision", HALF_TYPES)
def test_half_precision_is_fp32_masters_by_hand(precision: str) -> None:
    by_hand = half_by_hand(precision)
    for name, values in run_ranks(1, in_half, precision)[0].items():
        for what, theirs in by_hand.items():
            assert_same_bits(values[what], theirs, f"{name}: {what}")


def overflowing(settings: dict[str, Any]) -> Any:
    """A gradient too large for fp16 on one rank, in the third of five steps."""
    engine = engine_of(
        transformer(),
        config(**settings, fp16={"enabled": True, "initial_scale_power": 4, "hysteresis": 1}),
    )
    scales = []
    for step in range(5):
        loss = loss_of(engine, SHAPE.vocab, step, dist.get_rank(), dist.get_world_size())
        if step == 2 and dist.get_rank() == 1:
            loss = loss * 1e6
        engine.backward(loss)
        before = weights(engine)
        engine.step()
        if step == 2:
            after = weights(engine)
            assert all(torch.equal(before[name], after[name]) for name in before)
        scales.append(
            engine.optimizer.cur_scale if hasattr(engine.optimizer, "cur_scale") else None
        )
    assert counters(engine) == {4.0}
    assert engine.skipped_steps == 1
    found = everything(engine)
    assert all(value.isfinite().all() for values in found.values() for value in values.values())
    return found


@pytest.mark.parametrize("settings", [{}, {"stage": 1}, {"stage": 2}, ZERO_3], ids=str)
def test_an_overflow_skips_and_poisons_nothing(settings: dict[str, Any]) -> None:
    first, second = run_ranks(2, overflowing, settings)
    for what, values in first.items():
        for name, value in values.items():
            assert torch.equal(value, second[what][name])


# --- groups, frozen parameters, ways to hand the optimizer over -----------------------------------

STAGES = [{}, {"stage": 1}, {"stage": 2}, ZERO_3]


def frozen_model() -> Transformer:
    model = transformer()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.model.layers[0].self_attn.o_proj.bias.requires_grad_(False)
    return model


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    params = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.2},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0, "lr": 1e-2},
    ]


def handed_over(how: str) -> Any:
    found = {}
    for number, settings in enumerate(STAGES):
        model = frozen_model()
        options = {**OPTIONS, "head_dim": HEADS}
        if how == "by name":
            engine = engine_of(model, config(**settings), model_parameters=two_groups(model))
        elif how == "instance":
            optimizer = AMSF(two_groups(model), **options)
            engine = engine_of(model, config(**settings), optimizer=optimizer)
        elif how == "callable":
            engine = engine_of(
                model,
                config(**settings),
                optimizer=partial(AMSF, **options),
                model_parameters=two_groups(model),
            )
        train(engine, SHAPE.vocab, range(STEPS))
        assert counters(engine) == {float(STEPS)}
        found[number] = everything(engine)
        engine.destroy()
    return found


@pytest.mark.parametrize("how", ["by name", "instance", "callable"])
def test_groups_and_frozen_parameters(how: str) -> None:
    model = frozen_model()
    names = {id(param): name for name, param in model.named_parameters()}
    named = [
        {**group, "params": [(names[id(p)], p) for p in group["params"]]}
        for group in two_groups(model)
    ]
    optimizer = AMSF(named, **OPTIONS, head_dim=HEADS)
    train_plain(model, optimizer, SHAPE.vocab, range(STEPS), clip=CLIP)
    theirs = {"y": plain_weights(model)}
    with optimizer.averaged_parameters():
        theirs["x"] = plain_weights(model)
    for found in run_ranks(2, handed_over, how):
        for settings, values in found.items():
            for what, value in theirs.items():
                error, where = relative_error(values[what], value, NOISE)
                assert error <= 1e-5, f"{STAGES[settings]}: {what} of {where}: {error:.1e}"


def from_the_model() -> Any:
    """The whole module, with the names and heads that it tells; also under zero.Init."""
    import deepspeed

    found = {}
    for how in ("instance", "zero.Init", "zero.Init by name"):
        settings = config(**ZERO_3)
        settings["optimizer"]["params"].pop("head_dim")  # the module says it
        if how == "instance":
            model = transformer()
            engine = engine_of(model, settings, optimizer=AMSF(model, **OPTIONS))
        else:
            given = transformer().state_dict()
            with deepspeed.zero.Init(config_dict_or_path=settings):
                model = transformer()
            with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
                if dist.get_rank() == 0:
                    for name, param in model.named_parameters():
                        param.data.copy_(given[name])
            optimizer = {} if "name" in how else {"optimizer": AMSF(model, **OPTIONS)}
            engine = engine_of(model, settings, **optimizer)
        train(engine, SHAPE.vocab, range(STEPS))
        found[how] = everything(engine)
        engine.destroy()
    return found


def test_heads_are_read_from_the_module_also_under_zero_init() -> None:
    model = transformer()
    optimizer = AMSF(model, **OPTIONS)
    train_plain(model, optimizer, SHAPE.vocab, range(STEPS), clip=CLIP)
    theirs = {"y": plain_weights(model), "v": plain_moments(model, optimizer)}
    for found in run_ranks(2, from_the_model):
        for how, values in found.items():
            for what, value in theirs.items():
                error, where = relative_error(values[what], value, NOISE)
                assert error <= 1e-5, f"{how}: {what} of {where}: {error:.1e}"
