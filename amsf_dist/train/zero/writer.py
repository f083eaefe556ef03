"""How DeepSpeed writes the files of a checkpoint: durably, and without leaving others waiting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from amsf_dist.train.durable import sync

__all__ = ["Writer"]


class Writer(TorchCheckpointEngine):  # type: ignore[misc]
    """Files are on the disk when `save` returns.

    A process that cannot write keeps the reason to itself until all have come to the end: raised at
    once, it would leave the others waiting inside DeepSpeed.

    Attributes:
        failure: of the checkpoint that is being written.
    """

    failure: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file."""
        try:
            torch.save(state_dict, path)
            sync(Path(path))
        except (OSError, RuntimeError) as error:
            self.failure = error
