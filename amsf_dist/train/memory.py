"""How many bytes a process will hold, before there is a model: AMSF beside AdamW in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor
from transformers import PreTrainedModel

from amsf_dist.train.config import Config
from amsf_dist.train.model import sharding_units
from amsf_dist.train.optimizers import FP32, adamw_fp32, memory_by_owner
from amsf_dist.train.preflight import shapes_only
from amsf_dist.train.report import human_bytes
from amsf_dist.train.zero import memory as zero_memory

__all__ = ["largest_share", "largest_unit", "memory_table", "predict"]


def predict(config: Config, num_processes: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return bytes by owner on the process that holds most, for AMSF and for AdamW in fp32.

    Weights, gradients and optimizer state; activations and what a unit gathers for its forward pass
    come on top.

    Args:
        config: the job; its `amsf` section is used whatever its optimizer.
        num_processes: of the job.
    """
    model, optimizer = shapes_only(config.model_copy(update={"optimizer": "amsf"}))
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if config.parallel == "deepspeed":
        held = zero_memory.predicted(config, params, num_processes)
        owners = memory_by_owner(optimizer)
        lines = {
            name: -(-size // num_processes)
            for name, size in owners.items()
            if name not in ("weights", "gradients")
        }
        return {**held.owners(), **lines}, zero_memory.with_adamw(held)
    shards = config.shards(num_processes)
    share = largest_share(params, shards)
    amsf = {owner: round(size * share) for owner, size in memory_by_owner(optimizer).items()}
    if config.release and (
        config.accumulation.mode == "state" or config.micro_batches(num_processes) == 1
    ):
        amsf["gradients"] = largest_unit(model, shards)
    return amsf, adamw_fp32(round(sum(param.numel() for param in params) * share))


def largest_unit(model: PreTrainedModel, shards: int) -> int:
    """Return the bytes of the gradients of the unit that has most, on the first of some shards.

    Args:
        model: not sharded yet.
        shards: 1: every module that owns parameters is a unit.
    """
    modules = [model, *sharding_units(model)] if shards > 1 else list(model.modules())
    owned = {id(param) for module in modules[1:] for param in module.parameters()}
    units = [list(module.parameters(recurse=shards > 1)) for module in modules]
    if shards > 1:  # what is left belongs to the root
        units[0] = [param for param in units[0] if id(param) not in owned]
    return max(
        sum(
            -(-param.shape[0] // shards) * (param.numel() // param.shape[0]) * param.element_size()
            for param in unit
        )
        for unit in units
    )


def largest_share(params: Iterable[Tensor], shards: int) -> float:
    """Return the part of all elements on the first shard: FSDP2 gives it the most rows."""
    held = whole = 0
    for param in params:
        rows = param.shape[0] if param.ndim else 1
        held += math.ceil(rows / shards) * (param.numel() // max(rows, 1))
        whole += param.numel()
    return held / max(whole, 1)


def memory_table(config: Config, num_processes: int) -> str:
    """Return `predict` as a table."""
    amsf, adamw = predict(config, num_processes)
    owners = list(dict.fromkeys([*amsf, *adamw]))
    lines = [f"{'':<14}{'AMSF':>12}{'AdamW fp32':>14}"]
    for owner in owners:
        cells = [human_bytes(run[owner]) if owner in run else "-" for run in (amsf, adamw)]
        lines.append(f"{owner:<14}{cells[0]:>12}{cells[1]:>14}")
    total, base = sum(amsf.values()), sum(adamw.values())
    elements = adamw["exp_avg"] / FP32
    lines.append(f"{'total':<14}{human_bytes(total):>12}{human_bytes(base):>14}")
    lines.append(f"{'per parameter':<14}{total / elements:>10.2f} B{base / elements:>12.2f} B")
    processes = f"each of {num_processes} processes" if num_processes > 1 else "one process"
    lines.append(f"predicted for {processes} under {config.parallel}, without activations")
    return "\n".join(lines)
