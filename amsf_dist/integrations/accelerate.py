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
                folder = Path(input_dir)
                if folder.name != f"optimizer_{optimizer_index}":
                    folder = folder / f"optimizer_{optimizer_index}"
                if (folder / ".metadata").is_file():
                    ours.make_room(training=not _has_training_weights(folder))
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


def _has_training_weights(folder: Path) -> bool:
    """Whether a distributed checkpoint was saved in eval mode, y beside x."""
    from torch.distributed.checkpoint import FileSystemReader

    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    return any(key.startswith("optimizer.state.") and key.endswith(f".{STASH}") for key in entries)


def _put(module: ModuleType, name: str, wrap: Callable[..., Any]) -> None:
    """Put a wrapped function in the place of one, also where it has been imported already."""
    original = getattr(module, name, None)
    if original is None:  # an accelerate that has no such function does not do that either
        return
    wrapped = wrap(original)
    for holder in (module, *(sys.modules.get(other) for other in _IMPORTERS)):
        if holder is not None and getattr(holder, name, None) is original:
            setattr(holder, name, wrapped)
