"""Which tokens a step sees: a function of seed, step and place in the global batch alone.

So the order of the data depends neither on the number of processes nor on the micro-batch, and a
run that resumes at step k needs no loader state.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["TrainBatches", "validation_windows", "windows_at"]


class TrainBatches:
    """Sequences without replacement: every epoch is a new permutation, cut at a new offset."""

    def __init__(
        self, tokens: np.ndarray, sequence_length: int, global_batch_size: int, seed: int
    ) -> None:
        """Keep the array; nothing is read.

        Args:
            tokens: [num_tokens], at least 2 * sequence_length.
            sequence_length: tokens the model sees; a window holds one more, the last target.
            global_batch_size: sequences a step, over all processes.
            seed: of the order.
        """
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.seed = seed
        # The same in every epoch, whatever the offset: sample n belongs to epoch n // num_windows.
        self.num_windows = (len(tokens) - sequence_length) // sequence_length

    def micro_batch(self, step: int, first: int, count: int) -> Tensor:
        """Return sequences `first` .. `first + count - 1` of the global batch of a step.

        Returns:
            [count, sequence_length + 1] int64.
        """
        place = step * self.global_batch_size + first
        return windows_at(
            self.tokens, [self._start(place + row) for row in range(count)], self.sequence_length
        )

    def _start(self, sample: int) -> int:
        epoch, place = divmod(sample, self.num_windows)
        offset, order = _epoch_order(self.seed, epoch, self.sequence_length, self.num_windows)
        return offset + int(order[place]) * self.sequence_length


def validation_windows(num_tokens: int, sequence_length: int, limit: int | None) -> list[int]:
    """Return where the held-out sequences start: one after the other, without overlap."""
    num_windows = (num_tokens - 1) // sequence_length
    return [index * sequence_length for index in range(min(num_windows, limit or num_windows))]


def windows_at(tokens: np.ndarray, starts: list[int], sequence_length: int) -> Tensor:
    """Return [len(starts), sequence_length + 1] int64: inputs and, one later, their targets."""
    rows = [tokens[start : start + sequence_length + 1] for start in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _epoch_order(
    seed: int, epoch: int, sequence_length: int, num_windows: int
) -> tuple[int, np.ndarray]:
    generator = np.random.default_rng([seed, epoch])
    return int(generator.integers(sequence_length)), generator.permutation(num_windows)
