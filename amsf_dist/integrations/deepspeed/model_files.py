"""What a DeepSpeed checkpoint holds beside the optimizer: buffers, frozen weights, counters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amsf_dist.blocks import canonical_name
from amsf_dist.integrations.deepspeed.saved import optimizer_files

__all__ = ["Model", "model_of_files"]


@dataclass(frozen=True)
class Model:
    """Read from the files of all ranks.

    Attributes:
        frozen: whole parameters that the optimizer does not train.
        buffers: persistent ones.
        content: of the first rank's file.
        scaler: the loss scale of fp16, where it was saved.
    """

    frozen: dict[str, Tensor]
    buffers: dict[str, Tensor]
    content: Mapping[str, Any]
    scaler: Mapping[str, Any]


def model_of_files(folder: Path) -> Model:
    """Read the model's files of one tag, of any stage.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(folder.glob("zero_pp_rank_*_mp_rank_*_model_states.pt"), key=_rank)
    partitioned = bool(files)  # ZeRO-3: every rank has its part of the frozen weights
    files = files or sorted(folder.glob("mp_rank_*_model_states.pt"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *_model_states.pt")
    contents = [_read(path) for path in files]
    first = contents[0]
    module = {canonical_name(name): value for name, value in (first["module"] or {}).items()}
    buffers = {
        canonical_name(name): module[canonical_name(name)]
        for name in first.get("buffer_names") or ()
        if canonical_name(name) in module
    }
    shapes = first.get("frozen_param_shapes") or {}
    frozen = {}
    for name, shape in shapes.items():
        whole = canonical_name(name)
        if partitioned:
            parts = [content["frozen_param_fragments"][name].reshape(-1) for content in contents]
            frozen[whole] = torch.cat(parts)[: shape.numel()].view(shape)
        else:
            frozen[whole] = first["frozen_param_fragments"][name]
    if not partitioned:  # stage 0 and 1 save whole modules and no fragments
        frozen = {**module, **frozen}
    return Model(frozen, buffers, first, _scaler(folder))


def _scaler(folder: Path) -> Mapping[str, Any]:
    for path in (folder / "zero" / "loss_scaler.pt", *optimizer_files(folder)[:1]):
        if path.is_file():
            content = _read(path)
            found = content.get("optimizer_state_dict", content)
            return found if isinstance(found, Mapping) else {}
    return {}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return content


def _rank(path: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(found.group(1)) if found else 0
