"""torch alone: one process, or DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from amsf_dist.doctor.model import TinyModel, loss_of
from amsf_dist.doctor.reference import Compute
from amsf_dist.doctor.trial import options_for
from amsf_dist.doctor.wrapped import Factory, call, whole_weights

__all__ = ["UnderTorch"]


class UnderTorch:
    """See `amsf_dist.doctor.wrapped.Wrapped`."""

    compute = Compute()
    clip = 0.0
    micro_batches = 1
    notes: tuple[str, ...] = ()

    def __init__(self, factory: Factory, seed: int, device: torch.device) -> None:
        """Build the tiny model and wrap it.

        Args:
            factory: of the optimizer.
            seed: of the weights.
            device: of this process.
        """
        model = TinyModel(seed).to(device)
        ids = [device] if device.type == "cuda" else None
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._model: nn.Module = DistributedDataParallel(model, ids) if several else model
        self.name, self.details = type(self._model).__name__ if several else "none", "fp32"
        self.options = options_for({})
        self.optimizer = self.expected = factory(model, **self.options)

    def step(self, parts: Sequence[Tensor]) -> bool:
        """Backward and step."""
        self.optimizer.zero_grad()
        (tokens,) = parts
        loss_of(self._model, tokens).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return True

    def weights(self) -> dict[str, Tensor]:
        """The parameters."""
        return whole_weights(self._model)

    def eval(self) -> None:
        """`optimizer.eval()`."""
        call(self.optimizer, "eval")

    def train(self) -> None:
        """`optimizer.train()`."""
        call(self.optimizer, "train")

    def save(self, folder: Path) -> None:
        """One file, of the first process."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            saved = {"model": self._model.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save(saved, folder / "checkpoint.pt")

    def load(self, folder: Path) -> None:
        """The file, by all processes."""
        saved = torch.load(folder / "checkpoint.pt", weights_only=False)
        self._model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def close(self) -> None:
        """Nothing to do."""
