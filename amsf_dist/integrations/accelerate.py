"""accelerate: AMSF needs nothing from it but two things that it does without asking.

It puts DeepSpeed's own Adam in the place of an optimizer that is offloaded, and it reads FSDP2
checkpoints into whatever state the optimizer has at that moment, so that training weights saved
beside the average would stay unread. Both are functions for which it has no hook: they are wrapped
when accelerate is imported, and do nothing for other optimizers.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from amsf_dist.integrations.deepspeed.refusals import refuse_replacement
from amsf_dist.integrations.on_import import on_import
from amsf_dist.optimizer import AMSF
from amsf_dist.state import STASH

__all__ = ["register", "unwrapped"]

_IMPORTERS = ("accelerate.utils", "accelerate.accelerator", "transformers.trainer")
"""Modules that have taken the functions under their own name, if they were there first."""


def register() -> None:
    """Wrap the two functions, whenever accelerate is imported."""
    on_import("accelerate.utils.deepspeed", _wrap_replacement)
    on_import("accelerate.utils.fsdp_utils", _wrap_loading)


def unwrapped(optimizer: Any) -> AMSF | None:
    """The AMSF under accelerate's wrapper and DeepSpeed's.

    Args:
        optimizer: what `prepare` gave back.

    Returns:
        None if it is another optimizer.
    """
    while not isinstance(optimizer, AMSF):
        if not hasattr(optimizer, "optimizer"):
            return None
        optimizer = optimizer.optimizer
    return optimizer


def _wrap_replacement(module: ModuleType) -> None:
    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def map_pytorch_optim_to_deepspeed(optimizer: Any) -> Any:
            if isinstance(optimizer, AMSF):  # before its own is compiled, which takes a minute
                refuse_replacement("DeepSpeedCPUAdam")
            return original(optimizer)

        return map_pytorch_optim_to_deepspeed

    _put(module, "map_pytorch_optim_to_deepspeed", wrapped)


def _wrap_loading(module: ModuleType) -> None:
    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load_fsdp_optimizer(
            fsdp_plugin: Any,
            accelerator: Any,
            optimizer: Any,
            model: Any,
            input_dir: Any,
            optimizer_index: int = 0,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            ours = unwrapped(optimizer)
            if ours is not None:
                ours.make_room(training=not _was_saved_at_x(Path(input_dir), optimizer_index))
            return original(
                fsdp_plugin,
                accelerator,
                optimizer,
                model,
                input_dir,
                optimizer_index,
                *args,
                **kwargs,
            )

        return load_fsdp_optimizer

    _put(module, "load_fsdp_optimizer", wrapped)


def _was_saved_at_x(folder: Path, index: int) -> bool:
    """Whether a checkpoint has y beside x. The first rank looks: the others need not have it."""
    found = [not dist.is_initialized() or dist.get_rank() == 0]
    if found[0]:
        found[0] = _has_training_weights(folder, index)
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def _has_training_weights(folder: Path, index: int) -> bool:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    sharded = folder if folder.name == f"optimizer_{index}" else folder / f"optimizer_{index}"
    if (sharded / ".metadata").is_file():
        entries = FileSystemReader(sharded).read_metadata().state_dict_metadata
        ours = (key for key in entries if key.startswith("optimizer.state."))
        return any(key.endswith(f".{STASH}") for key in ours)
    whole = folder / ("optimizer.bin" if index == 0 else f"optimizer_{index}.bin")
    if not whole.is_file():
        return False  # for accelerate to say
    saved = torch.load(whole, mmap=True, weights_only=True, map_location="cpu")
    return any(STASH in entries for entries in saved["state"].values())


def _put(module: ModuleType, name: str, wrap: Callable[..., Any]) -> None:
    """Put a wrapped function in the place of one, also where it has been imported already."""
    original = getattr(module, name, None)
    if original is None:  # an accelerate that has no such function does not do that either
        return
    wrapped = wrap(original)
    for holder in (module, *(sys.modules.get(other) for other in _IMPORTERS)):
        if holder is not None and getattr(holder, name, None) is original:
            setattr(holder, name, wrapped)
