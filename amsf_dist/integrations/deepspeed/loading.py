"""`engine.load_checkpoint` for any number of ranks and any ZeRO stage, and full state dicts.

DeepSpeed loads a checkpoint into the layout that wrote it, or refuses. What AMSF saves says which
numbers of which parameter lie where, so anything else is put together from all ranks' files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amsf_dist.blocks import canonical_name
from amsf_dist.integrations.deepspeed import universal
from amsf_dist.integrations.deepspeed.fill import fill
from amsf_dist.integrations.deepspeed.model_files import Model, model_of_files
from amsf_dist.integrations.deepspeed.saved import (
    Saved,
    fits,
    kind_of,
    of_files,
    of_full,
    optimizer_files,
)
from amsf_dist.optimizer import AMSF

__all__ = ["load_checkpoint", "load_state_dict"]

logger = logging.getLogger(__name__)

# Of a model file: what DeepSpeed does not hand back as the client's state.
_TAKEN = (
    "module",
    "optimizer",
    "lr_scheduler",
    "global_steps",
    "skipped_steps",
    "dp_world_size",
    "mp_world_size",
    "data_sampler",
    "random_ltd",
)


def load_checkpoint(
    engine: Any,
    original: Callable[..., Any],
    load_dir: str,
    tag: str | None = None,
    **kwargs: Any,
) -> Any:
    """In place of `DeepSpeedEngine.load_checkpoint`.

    Args:
        engine: whose basic optimizer is an AMSF.
        original: DeepSpeed's function.
        load_dir: as for DeepSpeed.
        tag: as for DeepSpeed.
        **kwargs: as for DeepSpeed.

    Returns:
        (path, client state), as DeepSpeed does.
    """
    folder = _folder(engine, Path(load_dir), tag)
    if folder is None:
        return original(load_dir, tag, **kwargs)
    if engine.load_universal_checkpoint():
        saved: Saved | None = universal.of_folder(folder)
    else:
        saved = of_files(folder)
        if saved is None or _everywhere(_fits(engine, load_dir, folder.name)):
            return original(load_dir, tag, **kwargs)
    if saved is None:
        raise ValueError(
            f"{folder} is a universal checkpoint that amsf_dist did not write: convert with "
            "amsf_dist.integrations.deepspeed.to_universal, which knows block moments"
        )
    model = model_of_files(folder)
    logger.info("%s was saved under another sharding; putting it together", folder)
    weights_alone = kwargs.get("load_module_only", False)
    with_state = kwargs.get("load_optimizer_states", True) and not weights_alone
    _fill(engine, saved, {**model.frozen, **model.buffers}, with_state)
    if weights_alone:
        return str(folder), {}
    return str(folder), _take_over(engine, model, kwargs.get("load_lr_scheduler_states", True))


def load_state_dict(
    engine: Any,
    model_state_dict: Mapping[str, Tensor],
    state_dict: Mapping[str, Any],
    names: Sequence[str] = (),
) -> None:
    """Go on from what one process, or FSDP2, has saved.

    Args:
        engine: a DeepSpeed engine whose optimizer is AMSF; every rank must call it.
        model_state_dict: whole tensors, saved together with the optimizer's state.
        state_dict: of AMSF, whole tensors: of one process, or `get_optimizer_state_dict` with
            `full_state_dict=True`.
        names: of its parameters in the order of its groups, where it has none.

    Raises:
        ValueError: it does not fit the engine's model; nothing is changed then.
    """
    weights = {canonical_name(name): value for name, value in model_state_dict.items()}
    _fill(engine, of_full(weights, state_dict, names), weights)


def _folder(engine: Any, load_dir: Path, tag: str | None) -> Path | None:
    if tag is None:
        latest = load_dir / ("latest_universal" if engine.load_universal_checkpoint() else "latest")
        if not latest.is_file():
            return None
        tag = latest.read_text().strip()
    folder = load_dir / str(tag)
    return folder if folder.is_dir() else None


def _fits(engine: Any, load_dir: str, tag: str) -> bool:
    if engine.zero_optimization():
        path = Path(engine._get_zero_ckpt_name(load_dir, tag))
    else:
        path = Path(engine._get_ckpt_name(load_dir, tag))
    files = optimizer_files(path.parent)
    number = dist.get_world_size() if engine.zero_optimization() else 1
    pieces = engine.basic_optimizer._owner.extras()["amsf_pieces"]
    return len(files) == number and fits(path, pieces, kind_of(engine.optimizer))


def _everywhere(here: bool) -> bool:
    """Whether it is so on all ranks."""
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, here)
    return all(answers)


def _fill(engine: Any, saved: Saved, others: Mapping[str, Tensor], with_state: bool = True) -> None:
    """Trained parameters and their state, and what is not trained, into an engine."""
    optimizer: AMSF = engine.basic_optimizer
    owner: Any = optimizer._owner
    fill(optimizer, owner.flats, saved, with_state)
    _load_untrained(engine.module, others)
    owner.publish()


@torch.no_grad()
def _load_untrained(module: nn.Module, others: Mapping[str, Tensor]) -> None:
    import deepspeed

    for name, param in module.named_parameters():
        value = others.get(canonical_name(name))
        if param.requires_grad or value is None:
            continue
        if not hasattr(param, "ds_id"):
            param.copy_(value)
            continue
        with deepspeed.zero.GatheredParameters(param, modifier_rank=0):
            if dist.get_rank() == 0:
                param.copy_(value)
    for name, buffer in module.named_buffers():
        if (value := others.get(canonical_name(name))) is not None:
            buffer.copy_(value)


def _take_over(engine: Any, model: Model, load_lr_scheduler: bool) -> dict[str, Any]:
    """Counters of the engine, its scheduler and its loss scale; what remains is the client's."""
    content = dict(model.content)
    engine.global_steps = content["global_steps"]
    engine.global_samples = content.get(
        "global_samples", engine.global_steps * engine.train_batch_size()
    )
    engine.skipped_steps = content["skipped_steps"]
    engine.loaded_checkpoint_dp_world_size = content["dp_world_size"]
    engine.loaded_checkpoint_mp_world_size = content["mp_world_size"]
    if load_lr_scheduler and engine.lr_scheduler is not None and content.get("lr_scheduler"):
        engine.lr_scheduler.load_state_dict(content["lr_scheduler"])
    wrapper = engine.optimizer
    for name in ("loss_scaler", "dynamic_loss_scale"):
        if name in model.scaler and hasattr(wrapper, name):
            setattr(wrapper, name, model.scaler[name])
    return {key: value for key, value in content.items() if key not in _TAKEN}
