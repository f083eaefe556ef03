"""Who holds what: the process group; the model on one process, copied (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PretrainedConfig, PreTrainedModel

from amsf_dist.train.config import Config
from amsf_dist.train.errors import UserError, one_line
from amsf_dist.train.model import build_model, sharding_units

__all__ = [
    "World",
    "arithmetic",
    "build_parallel_model",
    "choose_device",
    "gradient_sync",
    "join",
]


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        rank: number of this process, 0 is the one that writes and speaks.
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the process that writes and speaks."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Return the sums over all processes; every process must call it."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def broadcast(self, value: Any) -> Any:
        """Return the main process's picklable value on every process."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Let a UserError on any process end all of them, instead of leaving them waiting."""
        message = None
        try:
            yield
        except UserError as error:
            message = str(error)
        messages: list[str | None] = [None] * self.size
        dist.all_gather_object(messages, message)
        failed = [rank for rank, text in enumerate(messages) if text]
        if failed:
            where = "" if len(failed) == self.size else f"process {failed[0]} of {self.size}: "
            raise UserError(where + str(messages[failed[0]]))


def choose_device(config: Config, local_size: int) -> str:
    """Return `cuda` or `cpu` for a number of processes on this machine.

    Raises:
        UserError: if the config asks for more GPUs than there are.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cuda" and gpus < local_size:
        raise UserError(
            f"device: cuda needs a GPU for each of {local_size} processes and torch sees {gpus}; "
            f"set nproc={max(gpus, 1)} or device=cpu",
            everywhere=False,  # another machine may have them
        )
    return "cuda" if config.device != "cpu" and gpus >= local_size else "cpu"


@contextlib.contextmanager
def join(config: Config) -> Iterator[World]:
    """Join the group that torchrun (or our launcher) describes, or a group of one, and leave it."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    # torchrun's name for the number of processes on this machine, and DeepSpeed's
    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size
    kind = choose_device(config, int(local_size))
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    # DeepSpeed looks for a GPU otherwise when it is imported, and transformers imports it.
    os.environ.setdefault("DS_ACCELERATOR", kind)
    timeout = datetime.timedelta(minutes=config.timeout_minutes)
    # gloo stands beside NCCL for what lies on the CPU: objects and checkpoints.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ:
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistError as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(
                f"process {rank} of {size} found no way to the others at {where} within "
                f"{config.timeout_minutes:g} minutes ({one_line(error, 200)}); see that all were "
                "started and that this machine reaches that address, or raise timeout_minutes",
                everywhere=False,
            ) from None
    else:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, rank=0, world_size=1, store=alone, timeout=timeout)
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()


def build_parallel_model(config: Config, found: PretrainedConfig, world: World) -> nn.Module:
    """Build the model on its device under `config.parallel`.

    The weights do not depend on the world size. FSDP2: shapes on the meta device, sharded, then
    filled from the main process, which alone holds the whole model once.

    Args:
        config: the job.
        found: from `model_config`.
        world: this process among the others.
    """
    if config.parallel == "fsdp2":
        with world.together():
            whole = build_model(config, found, "cpu") if world.is_main else None
        return _shard_and_fill(config, build_model(config, found, "meta"), whole, world)
    with world.together():
        model: nn.Module = build_model(config, found, "cpu")
    model = model.to(world.device)
    return DistributedDataParallel(model) if config.parallel == "ddp" else model


def arithmetic(config: Config, world: World) -> contextlib.AbstractContextManager[Any]:
    """Return the context of the forward pass: autocast for `mixed`, unless the weights are bf16."""
    if config.precision == "mixed" and config.parallel in ("ddp", "single"):
        return torch.autocast(world.device.type, torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def gradient_sync(model: nn.Module, last: bool, config: Config) -> Iterator[None]:
    """Reduce gradients over the processes in this micro-batch, or leave it to the last one.

    Sharded gradients are reduced in every micro-batch unless the config says otherwise: a shard is
    all that is kept then.
    """
    if isinstance(model, DistributedDataParallel):
        with contextlib.nullcontext() if last else model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or config.sync_every_micro_batch)
    yield


def _shard_and_fill(
    config: Config, model: PreTrainedModel, whole: PreTrainedModel | None, world: World
) -> nn.Module:
    shards = config.shards(world.size)
    sizes = {"replicate": world.size // shards, "shard": shards}
    if shards == world.size:
        del sizes["replicate"]
    # the last dimension is that of neighbours: who shares a copy is on one machine
    mesh = init_device_mesh(world.device.type, (*sizes.values(),), mesh_dim_names=(*sizes,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.precision == "mixed" else None,
        reduce_dtype=None if config.precision == "fp32" else torch.float32,
    )
    for module in (*sharding_units(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    model.to_empty(device=world.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole.state_dict() if whole is not None else {}, options=options)
    _fill_buffers(model, whole)
    return model


def _fill_buffers(model: nn.Module, whole: nn.Module | None) -> None:
    """Send every buffer: those of rotary embeddings are in no state dict."""
    source: dict[str, Tensor] = dict(whole.named_buffers()) if whole is not None else {}
    for name, buffer in model.named_buffers():
        if name in source:
            buffer.copy_(source[name])
        dist.broadcast(buffer, src=0)
