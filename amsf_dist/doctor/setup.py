"""What a configuration file asks for: DeepSpeed's JSON, accelerate's YAML, or nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from amsf_dist.train.errors import UserError, one_line

__all__ = ["Setup", "needed", "read_setup"]

# Of what `accelerate launch` exports: the rest is about ports, threads and devices.
_EXPORTED = ("ACCELERATE_", "FSDP_")
_SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")


@dataclass(frozen=True)
class Setup:
    """Which wrapper to try, and how it is told what to do.

    Attributes:
        kind: "plain", "deepspeed" or "accelerate".
        title: the file, or words for none.
        deepspeed: the JSON, where the kind is "deepspeed".
        environment: what `accelerate launch` would export, where the kind is "accelerate".
        processes: None: any number; 1 where the file rules out more.
        on_cpu: the file says so.
    """

    kind: str
    title: str
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    processes: int | None = None
    on_cpu: bool = False

    @property
    def shards(self) -> bool:
        """Whether accelerate is told to use FSDP."""
        return self.environment.get("ACCELERATE_USE_FSDP") == "true"

    @property
    def speeds(self) -> bool:
        """Whether DeepSpeed is used, directly or by accelerate."""
        by_accelerate = self.environment.get("ACCELERATE_USE_DEEPSPEED") == "true"
        return self.kind == "deepspeed" or by_accelerate


def needed(name: str) -> ModuleType:
    """Import deepspeed or accelerate.

    Raises:
        UserError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = name.split(".")[0]
        raise UserError(
            f"this configuration needs {extra}, and importing it says: {error}; "
            f"pip install 'amsf-dist[{extra}]'"
        ) from None


def read_setup(path: str | Path | None, nproc: int = 2) -> Setup:
    """Read a configuration file.

    Args:
        path: None: torch alone.
        nproc: processes that the trial will have.

    Raises:
        UserError: the file is missing, cannot be read, or is neither of the two kinds.
    """
    if path is None:
        return Setup("plain", "torch alone")
    path = Path(path)
    content = _content(path)
    if "distributed_type" in content or "compute_environment" in content:
        return _accelerate(path, content, nproc)
    if path.suffix in (".yaml", ".yml"):
        raise UserError(
            f"{path}: no distributed_type in it, so it is not what `accelerate config` writes; give "
            "such a file, a DeepSpeed JSON, or no file for torch alone"
        )
    sections = "zero_optimization optimizer bf16 fp16 train_batch_size".split()
    sections += ["train_micro_batch_size_per_gpu", "gradient_clipping"]
    if content and not any(key in content for key in sections):
        raise UserError(
            f"{path}: none of {', '.join(sections)} is in it, so it is not a DeepSpeed "
            "configuration; give one, or what `accelerate config` writes"
        )
    zero = content.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"{path}: zero_optimization must be a section, got {zero!r}")
    return Setup("deepspeed", str(path), deepspeed=content)


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a DeepSpeed JSON or an accelerate YAML")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        if path.suffix in (".yaml", ".yml"):
            content = needed("yaml").safe_load(text)
        else:
            content = needed("json").loads(text) if _is_json(text) else _with_comments(text)
    except UserError:
        raise
    except Exception as error:  # each library has its own
        raise UserError(f"{path}: {one_line(error, 200)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a mapping is needed at its top, got {type(content).__name__}")
    return content
