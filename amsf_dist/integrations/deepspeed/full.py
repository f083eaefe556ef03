"""A DeepSpeed checkpoint as full state dicts, for one process or for FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amsf_dist.integrations.deepspeed.model_files import model_of_files
from amsf_dist.integrations.deepspeed.saved import WEIGHT, Saved, of_files

__all__ = ["full_state_dicts"]


@torch.no_grad()
def full_state_dicts(
    checkpoint: str | Path, tag: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Put a checkpoint together from the files of all ranks; needs no processes.

    Args:
        checkpoint: the folder given to `engine.save_checkpoint`.
        tag: None: the latest.

    Returns:
        The model's state dict (fp32 where it was trained; x if the optimizer was in eval mode) and
        the optimizer's, keyed by parameter name. `AMSF(model).load_state_dict` takes the second
        as it is; for FSDP2 pass both to torch's `set_model_state_dict` and
        `set_optimizer_state_dict` with `full_state_dict=True`.

    Raises:
        ValueError: another optimizer wrote it.
    """
    checkpoint = Path(checkpoint)
    folder = checkpoint / (tag or (checkpoint / "latest").read_text().strip())
    saved = of_files(folder)
    if saved is None:
        raise ValueError(f"{folder} holds no state of AMSF")
    model = model_of_files(folder)
    weights = {name: _line(saved, name, WEIGHT) for name in saved.fragments}
    state = {name: _state(saved, name) for name in saved.fragments}
    groups = []
    for number, options in enumerate(saved.groups):
        names = [name for name in saved.fragments if saved.group_of[name] == number]
        kept = {key: value for key, value in options.items() if key != "first_weights"}
        groups.append({**kept, "params": names})
    return {**model.frozen, **model.buffers, **weights}, {"state": state, "param_groups": groups}


def _state(saved: Saved, name: str) -> dict[str, Any]:
    keys = {key for part in saved.fragments[name] for key in part.lines} - {WEIGHT}
    moments = {
        key: saved.whole_moments(name, key).view(shape)
        for key, shape in saved.moment_shapes[name].items()
    }
    counters = {
        key: torch.tensor(value, dtype=torch.float64) for key, value in saved.counters[name].items()
    }
    return {
        **{key: _line(saved, name, key) for key in keys},
        **moments,
        **counters,
    }


def _line(saved: Saved, name: str, key: str) -> Tensor:
    part = next(part for part in saved.fragments[name] if key in part.lines)
    values = part.lines[key].new_zeros(saved.numel(name))
    saved.read(name, key, 0, values.numel(), values)
    return values.view(saved.shapes[name])
