"""Optimizers by the bytes they keep: AdamW, Adam-mini, FlashAdamW, and AMSF's settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amsf_dist.hyper import Hyper
from amsf_dist.rules import RULES
from amsf_dist.state import WEIGHT
from amsf_dist.storage import Storage, state_storage, weight_storage
from amsf_dist.storage.grouped import SCALE_DTYPE

__all__ = ["Recipe", "amsf_recipe", "recipes"]

Bytes = Callable[[int], int]
"""Bytes that a line of so many numbers takes on a rank."""

FP32 = torch.float32
BF16 = torch.bfloat16
FLASH_GROUP = 32


@dataclass(frozen=True)
class Recipe:
    """An optimizer, and the dtypes in which a model is trained with it.

    Attributes:
        name: shown.
        stored: dtype of the weights that the optimizer moves; gradients have it too.
        compute: dtype of the weights in the forward pass, where the engine can make it another one.
        lines: what lies beside a weight, by owner.
        blocks: for optimizers with a moment per block: how `AMSF` is told to cut.
        release: weights move inside backward, and the gradients of a unit are freed.
    """

    name: str
    stored: torch.dtype
    compute: torch.dtype
    lines: Mapping[str, Bytes]
    blocks: Mapping[str, Any] | None = None
    release: bool = False


def recipes(engine_has_masters: bool, dtype: torch.dtype) -> list[Recipe]:
    """The rows of the table.

    Args:
        engine_has_masters: the engine keeps fp32 weights for the optimizer (DeepSpeed), so none of
            16 bits can be given to it.
        dtype: bf16, what people run: bf16 arithmetic, and fp32 weights for optimizers that need
            them; or fp32, everything.
    """
    rows = [
        Recipe("AdamW", FP32, dtype, {"exp_avg": _fp32, "exp_avg_sq": _fp32}),
        amsf_recipe("Adam-mini", FP32, dtype, averaging="ema", blocks="adam_mini"),
    ]
    narrow = dtype == BF16 and not engine_has_masters
    if narrow:
        # arXiv 2602.23349: bf16 weights, 8 error bits, and two 8-bit moments of which 32 numbers
        # share a 16-bit scale
        flash = {"error_bits": _int8, "exp_avg": _flash, "exp_avg_sq": _flash}
        rows.append(Recipe("FlashAdamW", BF16, BF16, flash))
    rows.append(amsf_recipe("AMSF fp32", FP32, dtype))
    if not narrow:
        rows.append(amsf_recipe("AMSF fp32, bf16 gap", FP32, dtype, state_storage="bf16"))
        rows.append(amsf_recipe("AMSF fp32, int8 gap", FP32, dtype, state_storage="int8"))
        return rows
    rows.append(amsf_recipe("AMSF bf16+16", BF16, BF16, weight_storage="bf16+16"))
    rows.append(amsf_recipe("AMSF bf16+8", BF16, BF16, weight_storage="bf16+8"))
    for gap in ("bf16", "int8"):
        options = {"weight_storage": "bf16+8", "state_storage": gap}
        rows.append(amsf_recipe(f"AMSF bf16+8, {gap} gap", BF16, BF16, **options))
    options = {"weight_storage": "stochastic", "state_storage": "int8"}
    rows.append(amsf_recipe("AMSF stochastic, int8 gap", BF16, BF16, **options))
    return rows


def amsf_recipe(name: str, stored: torch.dtype, compute: torch.dtype, **options: Any) -> Recipe:
    """A row for any setting.

    Args:
        name: shown.
        stored: dtype of the parameters that AMSF is given.
        compute: dtype of the forward pass.
        **options: arguments of `AMSF`.

    Raises:
        TypeError, ValueError: as `AMSF`.
    """
    hyper = Hyper.of(options)
    line = _line(state_storage(hyper.state_storage, stored), stored)
    lines: dict[str, Bytes] = {
        "error_bits": _measured(weight_storage(hyper.weight_storage, stored).beside, stored)
    }
    lines |= dict.fromkeys(RULES[hyper.averaging].lines, line)
    return Recipe(
        name, stored, compute, lines, {"blocks": hyper.blocks, "head_dim": hyper.head_dim}
    )


def _line(storage: Storage, dtype: torch.dtype) -> Bytes:
    """A line with the scales of its groups, if it has any."""
    numbers = _measured(storage.allocate, dtype)

    def size(numel: int) -> int:
        groups = -(-numel // storage.group) if storage.group else 0
        return numbers(numel) + groups * SCALE_DTYPE.itemsize

    return size


def _measured(allocate: Callable[[str, Tensor], Mapping[str, Tensor]], dtype: torch.dtype) -> Bytes:
    """What a storage allocates beside a parameter, asked of the storage itself."""

    def size(numel: int) -> int:
        like = torch.empty(numel, dtype=dtype, device="meta")
        tensors = allocate(WEIGHT, like).values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    return size


def _fp32(numel: int) -> int:
    return 4 * numel


def _int8(numel: int) -> int:
    return numel


def _flash(numel: int) -> int:
    return numel + 2 * -(-numel // FLASH_GROUP)
