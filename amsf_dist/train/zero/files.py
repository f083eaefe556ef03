"""DeepSpeed's checkpoint files inside a checkpoint of the job, seen from outside DeepSpeed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

from torch import Tensor

from amsf_dist.integrations.deepspeed import full_state_dicts
from amsf_dist.train.config import Config
from amsf_dist.train.errors import UserError

__all__ = ["TAG", "adamw_weights", "holds_zero", "read_whole", "require_deepspeed"]

TAG = "deepspeed"
"""DeepSpeed's name for the folder of one checkpoint: always the same below `step_*`."""


def require_deepspeed() -> None:
    """Raise a UserError if DeepSpeed is not installed; it is not imported."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "parallel: deepspeed is not installed; pip install 'amsf_dist[deepspeed]', "
            "or use parallel=fsdp2"
        )


def holds_zero(directory: Path) -> bool:
    """Whether DeepSpeed wrote a checkpoint."""
    return (directory / TAG).is_dir()


def read_whole(directory: Path, config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the whole model and the whole optimizer state, in this process's memory.

    Args:
        directory: of one checkpoint.
        config: of the job that goes on.

    Raises:
        UserError: if the state is AdamW's, or DeepSpeed is not installed to read its own files.
    """
    require_deepspeed()
    if config.optimizer == "adamw":
        raise UserError(
            f"{directory}: AdamW's state under DeepSpeed can only go on there; "
            "use parallel=deepspeed, or give another output_dir"
        )
    return full_state_dicts(directory, TAG)


def adamw_weights(directory: Path) -> dict[str, Tensor]:
    """Read the fp32 weights of a checkpoint whose optimizer is not ours."""
    require_deepspeed()
    silence = io.StringIO()  # it prints what it does, and draws bars
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(directory), TAG)
    return weights
