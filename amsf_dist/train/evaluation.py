"""Loss on held-out text, the same for every number of processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from amsf_dist.train.batches import validation_windows, windows_at
from amsf_dist.train.config import Config
from amsf_dist.train.heartbeat import beat
from amsf_dist.train.parallel import World, arithmetic

__all__ = ["Validation", "bits_per_byte", "evaluate", "sequence_losses"]


@dataclass(frozen=True)
class Validation:
    """Mean loss in nats per token, and in bits per byte of text, which compares tokenizers."""

    loss: float
    bits_per_byte: float


def sequence_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean loss of each sequence.

    Args:
        model: takes `input_ids`, gives `logits`.
        windows: [batch, sequence_length + 1] token numbers: inputs and, shifted by one, targets.

    Returns:
        [batch] nats per token, fp32.
    """
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="none"
    )
    return losses.view(windows.shape[0], -1).mean(dim=1)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    world: World,
) -> Validation:
    """Evaluate the weights as they are; every process must call it.

    Args:
        model: its parameters hold the weights to evaluate (x: see `optimizers.evaluation_weights`).
        tokens: [num_validation] held-out token numbers.
        tokenizer: to count the bytes of the targets.
        config: the job.
        world: this process among the others.
    """
    length = config.data.sequence_length
    limit = config.eval_batches and config.eval_batches * config.global_batch_size
    starts = validation_windows(len(tokens), length, limit)
    per_process = config.global_batch_size // world.size // config.micro_batches(world.size)
    total = 0.0
    model.eval()
    # Every process runs the same number of forward passes, or sharded layers would wait for ever:
    # where the windows run out it runs the first one and leaves it out of the sum.
    for first in range(0, len(starts), per_process * world.size):
        mine = starts[first + world.rank : first + per_process * world.size : world.size]
        windows = windows_at(tokens, mine or starts[:1], length).to(world.device)
        with arithmetic(config, world):
            losses = sequence_losses(model, windows)
        total += float(losses[: len(mine)].double().sum())
        beat()
    model.train()
    loss = world.sum([total])[0] / len(starts)
    return Validation(loss, bits_per_byte(loss, tokens[1 : len(starts) * length + 1], tokenizer))


def bits_per_byte(loss: float, targets: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> float:
    """Convert nats per token into bits per byte of the text that the targets stand for."""
    text = tokenizer.decode(
        targets.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    num_bytes = len(str(text).encode("utf-8", errors="replace"))
    return loss * len(targets) / math.log(2) / max(1, num_bytes)
