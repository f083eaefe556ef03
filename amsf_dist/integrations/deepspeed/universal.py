"""DeepSpeed's universal checkpoint, a folder per parameter, with block moments in it.

DeepSpeed's own converter knows Adam's states, one number per element, and nothing else.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amsf_dist.integrations.deepspeed.saved import WEIGHT, Fragment, Saved, Vector, of_files
from amsf_dist.state import MOMENTS

__all__ = ["of_folder", "to_universal"]

_FILE = "amsf.pt"
_WEIGHT_FILE = "fp32"  # DeepSpeed's name for it


@torch.no_grad()
def to_universal(checkpoint: str | Path, universal: str | Path, tag: str | None = None) -> Path:
    """Write a checkpoint of an AMSF engine as a universal one.

    An engine with `"checkpoint": {"load_universal": true}` loads it, at any stage and on any number
    of ranks; weights and counters lie where DeepSpeed's converter puts them.

    Args:
        checkpoint: the folder given to `engine.save_checkpoint`.
        universal: the folder to write.
        tag: None: the latest.

    Returns:
        The folder of the tag in `universal`.

    Raises:
        ValueError: another optimizer wrote it.
        FileExistsError: the folder is there already.
    """
    checkpoint, universal = Path(checkpoint), Path(universal)
    tag = tag or (checkpoint / "latest").read_text().strip()
    source, target = checkpoint / tag, universal / tag
    saved = of_files(source)
    if saved is None:
        raise ValueError(f"{source} holds no state of AMSF: use DeepSpeed's own ds_to_universal.py")
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it, or give another folder")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "zero").mkdir(parents=True)
    for name in saved.fragments:
        _write(partial / "zero" / name, name, saved)
    torch.save(
        {
            "groups": saved.groups,
            "group_of": saved.group_of,
            "shapes": saved.shapes,
            "moment_shapes": saved.moment_shapes,
            "block_numel": saved.block_numel,
            "counters": saved.counters,
        },
        partial / "zero" / _FILE,
    )
    for path in source.glob("*model_states.pt"):
        shutil.copy2(path, partial / path.name)
    for path in source.glob("*optim_states.pt"):  # the loss scale lies there
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        scaler = _scaler(content.get("optimizer_state_dict"))
        if scaler:
            torch.save(scaler, partial / "zero" / "loss_scaler.pt")
        break
    partial.rename(target)
    (universal / "latest_universal").write_text(tag)
    return target


def _scaler(wrapper: Any) -> dict[str, Any]:
    names = ("loss_scaler", "dynamic_loss_scale")
    return {name: wrapper[name] for name in names if name in (wrapper or {})}


def _write(folder: Path, name: str, saved: Saved) -> None:
    folder.mkdir()
    shape = saved.shapes[name]
    numel = saved.numel(name)
    keys = sorted({key for part in saved.fragments[name] for key in part.lines})
    for key in keys:
        values = torch.zeros(numel, dtype=saved.fragments[name][0].lines[key].dtype)
        if saved.read(name, key, 0, numel, values):
            file = _WEIGHT_FILE if key == WEIGHT else key
            torch.save({"param": values.view(shape), "cat_dim": 0}, folder / f"{file}.pt")
    for key in saved.block_numel[name]:
        vector = saved.whole_moments(name, key)
        torch.save({"param": vector, "per_block": True}, folder / f"{key}.pt")
    torch.save(saved.counters[name]["step"], folder / "step.pt")


def of_folder(folder: Path) -> Saved | None:
    """Read a universal checkpoint; None if `to_universal` did not write it."""
    if not (folder / "zero" / _FILE).is_file():
        return None
    known = torch.load(folder / "zero" / _FILE, map_location="cpu", weights_only=False)
    saved = Saved(**known)
    for name in saved.shapes:
        lines: dict[str, Tensor] = {}
        moments: dict[str, Vector] = {}
        for path in (folder / "zero" / name).glob("*.pt"):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
            if path.stem in MOMENTS:
                moments[path.stem] = Vector(content["param"], 0)
            elif isinstance(content, dict):
                key = WEIGHT if path.stem == _WEIGHT_FILE else path.stem
                lines[key] = content["param"].reshape(-1)
        saved.fragments[name] = [Fragment(0, saved.numel(name), lines, moments)]
    return saved
