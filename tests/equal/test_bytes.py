"""Promise 4: 16-bit weights and lines that lose nothing they need, and round alike everywhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import OPTIONS, SHAPES, fsdp1, fsdp2, hsdp, shard1
from layouts import weights as plain_weights
from models import Transformer, assert_same_bits
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from amsf_dist import AMSF
from amsf_dist.shards import copy_into

SHAPE = SHAPES["uneven"]
STEPS = 12
HALF = [torch.bfloat16, torch.float16]


def transformer(dtype: torch.dtype) -> Transformer:
    return Transformer(SHAPE, dtype=torch.float32).to(dtype)


def gradient(param: torch.Tensor, name: str, step: int) -> torch.Tensor:
    """The same whatever holds the parameter, and a number of its dtype."""
    seed = sum(map(ord, name)) + 1000 * step
    whole = torch.randn(tuple(param.shape), generator=torch.Generator().manual_seed(seed)) * 1e-2
    return whole.to(param.dtype)


def fit(model: nn.Module, optimizer: AMSF, steps: Any = range(STEPS)) -> None:
    for step in steps:
        for name, param in model.named_parameters():
            grad = gradient(param, name, step)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        optimizer.step()


@pytest.mark.parametrize("averaging", ["schedule_free", "ema"])
@pytest.mark.parametrize("blocks", ["auto", "element", "tensor"])
def test_16_error_bits_are_fp32_weights_bit_for_bit(averaging: str, blocks: str) -> None:
    options = {**OPTIONS, "averaging": averaging, "blocks": blocks}
    short, long = transformer(torch.bfloat16), transformer(torch.bfloat16).float()
    ours = AMSF(short, weight_storage="bf16+16", **options)
    theirs = AMSF(long, **options)
    for step in range(STEPS):
        for (name, p), q in zip(short.named_parameters(), long.parameters(), strict=True):
            p.grad = gradient(p, name, step)
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
    x = ours.averaged_state_dict(short, dtype=torch.float32)
    trained = dict(long.named_parameters())
    exact = theirs.averaged_state_dict(long)
    assert_same_bits({name: x[name] for name in trained}, {name: exact[name] for name in trained})
    for p, q in zip(short.parameters(), long.parameters(), strict=True):
        # what the model computes with: nearest, and of two equally near either
        assert ((p.float() - q).abs() <= (q.bfloat16().float() - q).abs()).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("storage", ["auto", "kahan", "bf16+8", "bf16+16"])
def test_updates_smaller_than_the_last_place_arrive(storage: str, dtype: torch.dtype) -> None:
    """400 steps of a 3000th of the weight each; a plain 16-bit weight would not move at all."""
    param = nn.Parameter(torch.ones(64, dtype=dtype))
    step = 2.0**-12 / 3 if dtype == torch.bfloat16 else 2.0**-14 / 3
    optimizer = AMSF(
        [("w", param)],
        lr=step,
        betas=(0.0, 0.0),
        averaging="ema",
        blocks="element",
        weight_storage=storage,
        eps=0.0,
    )
    for _ in range(400):
        param.grad = torch.ones_like(param)
        optimizer.step()
    expected = 1.0 - 400 * step
    assert torch.allclose(param.float(), torch.full((64,), expected), rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("storage", ["native", "stochastic", "kahan", "bf16+8", "bf16+16"])
@pytest.mark.parametrize("dtype", HALF)
def test_both_modes_are_exact_and_the_average_survives_its_export(
    storage: str, dtype: torch.dtype
) -> None:
    model = transformer(dtype)
    optimizer = AMSF(model, weight_storage=storage, state_storage="bf16", **OPTIONS)
    fit(model, optimizer)
    before = copy.deepcopy((dict(model.named_parameters()), dict(optimizer.state_dict()["state"])))
    x = optimizer.averaged_state_dict(model, dtype=torch.float32)
    optimizer.eval()
    assert_same_bits(optimizer.averaged_state_dict(model, dtype=torch.float32), x)
    for name, param in model.named_parameters():
        assert torch.equal(param, x[name].to(dtype))
    optimizer.train()
    after = dict(model.named_parameters()), dict(optimizer.state_dict()["state"])
    assert_same_bits(after, before)

    other = transformer(dtype)
    fresh = AMSF(other, weight_storage=storage, **OPTIONS)
    fresh.load_averaged_state_dict(x)
    again = fresh.averaged_state_dict(other, dtype=torch.float32)
    bound = {"native": 2**-8, "stochastic": 2**-8, "kahan": 2**-16, "bf16+8": 2**-16}
    for name, value in x.items():
        error = (again[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)
        assert error <= bound.get(storage, 0.0 if dtype == torch.bfloat16 else 2**-20), name


def low_bits(storage: str, under: str, steps: int = STEPS) -> Any:
    model: nn.Module = transformer(torch.bfloat16)
    wraps = {"fsdp2": fsdp2, "shard1": shard1, "hsdp": hsdp}
    if under in wraps:
        model = wraps[under](model)
    optimizer = AMSF(
        model,
        weight_storage=storage,
        state_storage="bf16",
        seed=5,
        deterministic=True,
        **OPTIONS,
    )
    fit(model, optimizer, range(steps))
    found = {"y": plain_weights(model, optimizer)}
    averages = optimizer.averaged_state_dict(model, dtype=torch.float32)
    found["x"] = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in averages.items()
    }
    return found


@pytest.mark.parametrize("storage", ["stochastic", "bf16+8", "kahan"])
def test_every_sharding_draws_the_same_numbers(storage: str) -> None:
    alone = low_bits(storage, "single")
    for under, world_size in (("fsdp2", 2), ("fsdp2", 3), ("shard1", 2), ("hsdp", 4)):
        for found in run_ranks(world_size, low_bits, storage, under):
            assert_same_bits(found, alone, f"{under} on {world_size}")


def test_another_seed_draws_other_numbers() -> None:
    model, other = transformer(torch.bfloat16), transformer(torch.bfloat16)
    options = {**OPTIONS, "weight_storage": "stochastic"}
    fit(model, AMSF(model, seed=1, **options))
    fit(other, AMSF(other, seed=2, **options))
    assert any(
        not torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("storage", ["stochastic", "kahan", "bf16+8"])
def test_resume_is_exact_and_weights_without_error_bits_load(storage: str) -> None:
    options = {**OPTIONS, "weight_storage": storage, "state_storage": "bf16"}
    model = transformer(torch.bfloat16)
    optimizer = AMSF(model, **options)
    fit(model, optimizer, range(6))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    fit(model, optimizer, range(6, STEPS))

    again = transformer(torch.bfloat16)
    resumed = AMSF(again, **options)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    fit(again, resumed, range(6, STEPS))
    assert_same_bits(dict(again.named_parameters()), dict(model.named_parameters()))

    for entries in saved[1]["state"].values():
        for key in [key for key in entries if key.startswith("weight_")]:
            if isinstance(entries[key], torch.Tensor) and entries[key].dim():
                del entries[key]
    resumed.load_state_dict(saved[1])
    fit(again, resumed, range(6, 7))


def test_memory_is_what_the_table_says() -> None:
    model = transformer(torch.bfloat16)
    numel = sum(param.numel() for param in model.parameters())
    for storage, error in (("auto", 1), ("bf16+16", 2), ("kahan", 2), ("stochastic", 0)):
        told = AMSF(model, weight_storage=storage, state_storage="bf16").memory()
        assert told["weights"] == 2 * numel and told["error_bits"] == error * numel
        assert told["gap"] == 2 * numel


def flat_masters() -> None:
    """FSDP1's flat parameters of 16 bits: error bits lie over the same slices."""
    model = fsdp1("FULL_SHARD", True)(transformer(torch.bfloat16))
    optimizer = AMSF(model, weight_storage="bf16+8", **OPTIONS)
    assert dist.get_world_size() == 2
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e-3)
    optimizer.step()
    assert optimizer.memory()["error_bits"] == sum(p.numel() for p in model.parameters())
    for param in model.parameters():
        error = optimizer.state[param]["weight_error"]
        assert error.dtype == torch.int8 and error.shape == param.shape
        x = torch.empty_like(param)
        copy_into(x, param.detach())


def test_flat_parameters() -> None:
    run_ranks(2, flat_masters)
