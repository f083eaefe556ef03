"""One run: a setting and a seed in, one record out."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from amsf_dist.train.batches import TrainBatches, validation_windows, windows_at
from benchmarks.convergence import record
from benchmarks.convergence.optimizers import BUILDERS, averaged, set_learning_rate
from benchmarks.convergence.setting import STEPS, Setting
from benchmarks.convergence.text import Text
from benchmarks.convergence.trainee import BATCH_SIZE, SEQUENCE_LENGTH, Trainee, Working

__all__ = ["EVALUATE_EVERY", "train"]

EVALUATE_EVERY = 150
_HELD_OUT_WINDOWS = 512  # whole batches: the model is compiled for one shape
_LAST = 100  # steps whose mean is the training loss


def train(
    setting: Setting, seed: int, text: Text, working: Working, steps: int = STEPS
) -> dict[str, Any]:
    """Train once.

    Args:
        setting: which optimizer, and its numbers.
        seed: of the initial weights and of the order of the data.
        text: the same for all.
        working: the model that computes; overwritten.
        steps: the horizon, of the cosine too.

    Returns:
        The record: held-out loss in nats per byte (None where it is not finite), its curve, the
        training loss, bytes, processor time, versions, hardware.
    """
    trainee = Trainee(working, setting.weights, seed)
    optimizer = BUILDERS[setting.optimizer](trainee.owned, setting.options, seed)
    if hasattr(optimizer, "train"):
        optimizer.train()
    batches = TrainBatches(text.train, SEQUENCE_LENGTH, BATCH_SIZE, seed)
    params = list(trainee.owned.parameters())
    curve, losses = [], []
    began = time.process_time()
    for step in tqdm(range(steps), desc=f"{setting.name} seed {seed}", mininterval=10):
        set_learning_rate(optimizer, setting.optimizer, setting.options, step, steps)
        losses.append(trainee.backward(batches.micro_batch(step, 0, BATCH_SIZE)))
        if setting.clip is not None:
            torch.nn.utils.clip_grad_norm_(params, setting.clip)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == steps:
            curve.append([step + 1, held_out_loss(trainee, optimizer, text)])
    return {
        "name": setting.name,
        "setting": setting.identity(),
        "seed": seed,
        "steps": steps,
        "held_out": curve[-1][1],
        "train": _finite(sum(losses[-_LAST:]) / len(losses[-_LAST:])),
        "curve": curve,
        "parameters": trainee.numel,
        "bytes": measured_bytes(params, optimizer),
        "seconds": round(time.process_time() - began),
        "text": text.sha256[:12],
        "hardware": record.hardware(working.device),
        "versions": record.versions(),
    }


@torch.no_grad()
def held_out_loss(trainee: Trainee, optimizer: torch.optim.Optimizer, text: Text) -> float | None:
    """Mean loss over the same held-out windows for all, at the weights to evaluate."""
    every = validation_windows(len(text.held_out), SEQUENCE_LENGTH, None)
    starts = every[:: len(every) // _HELD_OUT_WINDOWS][:_HELD_OUT_WINDOWS]  # from all documents
    total = 0.0
    with averaged(optimizer):
        for first in range(0, len(starts), BATCH_SIZE):
            windows = windows_at(text.held_out, starts[first : first + BATCH_SIZE], SEQUENCE_LENGTH)
            total += float(trainee.losses(windows).mean())
    return _finite(total * BATCH_SIZE / len(starts))


def measured_bytes(
    params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, int]:
    """Bytes of the distinct storages of the weights, and of what the optimizer keeps beside them.

    Gradients are not counted: all settings have them here, in the dtype of the weights.
    """
    weights = _storages(params)
    state = _storages(
        value
        for entries in optimizer.state.values()
        for value in entries.values()
        if isinstance(value, Tensor)
    )
    return {
        "weights": sum(weights.values()),
        "state": sum(size for place, size in state.items() if place not in weights),
    }


def _storages(tensors) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _finite(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
