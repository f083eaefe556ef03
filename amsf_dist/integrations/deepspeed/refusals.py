"""What DeepSpeed can be told to do that AMSF cannot do right: refused, with the cure."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

__all__ = [
    "refuse_client",
    "refuse_clipping",
    "refuse_masters",
    "refuse_replacement",
    "refuse_settings",
    "warn_of_clipping",
]

logger = logging.getLogger(__name__)

_MASTERS = (
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
)
"""DeepSpeed's names for what the optimizer moves, also where it has 16 bits."""


def refuse_client(engine: Any) -> None:
    """Before DeepSpeed looks at an AMSF instance, or at what a callable has made.

    Raises:
        RuntimeError: DeepSpeed insists on its own CPU optimizer.
    """
    if engine.zero_use_cpu_optimizer() and engine.zero_force_ds_cpu_optimizer():
        raise RuntimeError(
            "DeepSpeed offloads the optimizer and takes no other than DeepSpeedCPUAdam from a "
            'client: set "zero_force_ds_cpu_optimizer": false at the top of its configuration, or '
            'name AMSF there, "optimizer": {"type": "AMSF", "params": {...}}, and pass none'
        )


def refuse_replacement(by: str) -> None:
    """Another optimizer carries our parameter groups: accelerate has put it in AMSF's place.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"AMSF was silently replaced by {by}: accelerate does this where the optimizer is "
        'offloaded. Set "zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration, or '
        'name AMSF there, "optimizer": {"type": "AMSF", "params": {...}}, and pass '
        "accelerate.utils.DummyOptim(model.parameters()) to prepare()"
    )


def refuse_settings(engine: Any) -> None:
    """Before DeepSpeed builds its wrapper.

    Raises:
        RuntimeError: it was told to do something that would train wrongly.
    """
    zero = engine._config.zero_config
    offload = zero.offload_optimizer
    problems = {
        "offload_optimizer to nvme: it keeps no fp32 weights between steps; offload to cpu": (
            getattr(offload, "device", None) == "nvme"
        ),
        "offload_optimizer.ratio below 1: its second optimizer must be DeepSpeed's own; set it "
        "to 1.0, or leave it out": offload is not None and float(offload.ratio) < 1.0,
        "super_offload: it runs an Adam in a process of its own; leave it out": (
            getattr(offload, "super_offload", False)
        ),
        "zenflow: it runs an Adam of its own; leave it out": getattr(engine, "zenflow", None),
        "elastic_checkpoint: it gives every rank the block moments of the first; leave it out, "
        "checkpoints load on any number of ranks without it": zero.elastic_checkpoint,
        "compute_grad_norm: false with fp16 autocast: ranks would skip different steps; leave "
        "compute_grad_norm out": (
            not getattr(zero, "compute_grad_norm", True)
            and engine.torch_autocast_enabled()
            and engine.torch_autocast_dtype() == torch.float16
        ),
        "tensor parallelism: rows are cut over its ranks, which the optimizer is not told; use "
        "FSDP2 with tensor parallelism instead": _tensor_parallel(engine),
    }
    for problem, present in problems.items():
        if present:
            raise RuntimeError(f"AMSF under DeepSpeed does not work with {problem}")


def refuse_masters(wrapper: Any, groups: Iterable[Mapping[str, Any]]) -> None:
    """After DeepSpeed has built its wrapper.

    Args:
        wrapper: DeepSpeed's.
        groups: the optimizer's.

    Raises:
        RuntimeError: the weights that the optimizer moves have 16 bits, and nothing beside them.
    """
    if all(group["weight_storage"] != "native" for group in groups):
        return
    for name in _MASTERS:
        if any(flat.dtype.itemsize < 4 for flat in getattr(wrapper, name, ())):
            raise RuntimeError(
                "weight_storage='native' loses small updates in masters of 16 bits "
                "(bf16_master_weights_and_grads, fp16_master_weights_and_grads): use "
                "weight_storage='auto', or leave that out"
            )


def refuse_clipping(groups: Iterable[Mapping[str, Any]]) -> None:
    """Norms are of what the optimizer is shown: here parameters joined, some of them at a time.

    Raises:
        RuntimeError: a group clips by norms.
    """
    for group in groups:
        if group["clip"] == "norm":
            raise RuntimeError(
                f"max_norm={group['max_norm']}: under DeepSpeed its own clipping knows the norm of "
                f'all gradients: leave max_norm out and set "gradient_clipping": '
                f"{group['max_norm']}"
            )
        if group["clip"] == "tensor":
            raise RuntimeError(
                "clip='tensor' goes by the norm of every parameter, and DeepSpeed joins them: use "
                "clip='block'"
            )


def warn_of_clipping(config: Any) -> None:
    """Say once what DeepSpeed does unasked: it changes every update."""
    if "gradient_clipping" not in config._param_dict and config.gradient_clipping:
        logger.warning(
            "gradient_clipping is not set, and this DeepSpeed clips at a norm of %g by default: "
            'say "gradient_clipping": %g, or 0.0 for none',
            config.gradient_clipping,
            config.gradient_clipping,
        )


def _tensor_parallel(engine: Any) -> bool:
    if engine.mpu is not None and hasattr(engine.mpu, "get_tensor_model_parallel_world_size"):
        return bool(engine.mpu.get_tensor_model_parallel_world_size() > 1)
    if engine.mpu is not None and hasattr(engine.mpu, "get_model_parallel_world_size"):
        return bool(engine.mpu.get_model_parallel_world_size() > 1)
    return bool(engine.autotp_size() > 1) if hasattr(engine, "autotp_size") else False
