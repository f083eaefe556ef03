"""The raw record: one line of JSON a finished run, in the order they ended."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.convergence.setting import Setting

__all__ = ["RESULTS", "append", "find", "hardware", "read", "versions"]

RESULTS = Path(__file__).resolve().parent.parent / "results"
_PACKAGES = (
    "torch",
    "transformers",
    "schedulefree",
    "adam-mini",
    "flashoptim",
    "pytorch_optimizer",
)


def read(path: Path) -> list[dict[str, Any]]:
    """All lines; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line; it is whole or not there."""
    line = json.dumps(record) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def find(
    records: list[dict[str, Any]], setting: Setting, seed: int, steps: int
) -> dict[str, Any] | None:
    """The line of a run, by what decides its outcome; the name may have changed."""
    wanted = json.loads(json.dumps(setting.identity()))
    for record in records:
        if (record["setting"], record["seed"], record["steps"]) == (wanted, seed, steps):
            return record
    return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: str) -> str:
    """The processor that computed, in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    matrix_units = ", AMX" if "amx_bf16" in text else ""
    return f"{names[0] if names else platform.processor()}{matrix_units}, 1 thread"
