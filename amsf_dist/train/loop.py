"""The steps: forward, backward, clip, move; evaluate, save, and stop when asked to."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from amsf_dist.diagnostics import StepWatch
from amsf_dist.optimizer import AMSF
from amsf_dist.train import checkpoint
from amsf_dist.train.batches import TrainBatches
from amsf_dist.train.config import Config
from amsf_dist.train.errors import UserError
from amsf_dist.train.evaluation import Validation, evaluate
from amsf_dist.train.heartbeat import beat
from amsf_dist.train.moved import Moved
from amsf_dist.train.optimizers import evaluation_weights, set_learning_rate
from amsf_dist.train.parallel import World
from amsf_dist.train.report import Report
from amsf_dist.train.signals import StopRequest
from amsf_dist.train.tokens import Tokens
from amsf_dist.train.trainer import Trainer

__all__ = ["MAX_SKIPPED", "Run", "train"]

MAX_SKIPPED = 20  # steps in a row without a finite gradient, after which there is no hope


@dataclass
class Run:
    """Everything one training run holds.

    Attributes:
        config: of this run.
        world: this process among the others.
        trainer: has the model and the optimizer.
        tokens: training and held-out text.
        tokenizer: counts bytes, and goes into the export.
        report: what is told while it trains.
        stop: whether someone asked to stop.
        directory: `output_dir`.
    """

    config: Config
    world: World
    trainer: Trainer
    tokens: Tokens
    tokenizer: PreTrainedTokenizerBase
    report: Report
    stop: StopRequest
    directory: Path

    def validate(self) -> Validation:
        """Evaluate at x; every process must call it."""
        trainer = self.trainer
        with evaluation_weights(trainer.optimizer):
            return evaluate(
                trainer.model, self.tokens.validation, self.tokenizer, self.config, self.world
            )

    def save(self, step: int) -> Path:
        """Save the state after `step` steps; every process must call it."""
        return checkpoint.save(
            self.directory / "checkpoints",
            step,
            self.trainer,
            self.config,
            self.tokens.sha256,
            self.world,
        )


def train(run: Run, first_step: int) -> tuple[int, str | None]:
    """Train from step `first_step` to the end of the config, or until asked to stop.

    The state after the last step is saved in both cases.

    Returns:
        Steps done, and what asked to stop (None: nothing did).

    Raises:
        UserError: if the gradients stay without finite values.
    """
    config = run.config
    batches = TrainBatches(
        run.tokens.train, config.data.sequence_length, config.global_batch_size, config.seed
    )
    skipped, skipped_in_a_row = 0, 0
    done, reason = first_step, None
    while done < config.steps and reason is None:
        watch = _watch(run, done + 1)
        start = time.perf_counter()
        loss, moved = _step(run, batches, done)
        seconds = time.perf_counter() - start
        told = watch.after() if watch is not None else None
        # One small reduction settles what all must see alike: the loss, whether every process has
        # moved, and whether to stop.
        stops = run.stop.reason() is not None
        total, skips, asked = run.world.sum([loss, float(not moved.applied), float(stops)])
        done += 1
        beat()
        skipped_in_a_row = skipped_in_a_row + 1 if skips else 0
        skipped += skipped_in_a_row > 0
        run.report.step(
            done,
            seconds,
            loss=total / run.world.size,
            grad_norm=moved.norm,
            lr=float(run.trainer.optimizer.param_groups[0]["lr"]),
            skipped_steps=skipped,
        )
        if done == first_step + 1:
            run.report.memory(done, run.trainer.memory(), run.trainer.other_memory())
        if watch is not None and told is not None:
            run.report.optimizer(done, told, watch)
        if skipped_in_a_row >= MAX_SKIPPED:
            raise UserError(
                f"step {done}: no finite gradient in {MAX_SKIPPED} steps; lower the learning rate, "
                "raise the warmup, or continue from the last checkpoint with another output_dir"
            )
        if asked:
            reason = run.world.broadcast(run.stop.reason()) or "another process"
        elif done % config.eval_every == 0 and done < config.steps:
            run.report.validation(done, run.validate())
        if asked or done % config.save_every == 0 or done == config.steps:
            run.save(done)
    return done, reason


def _watch(run: Run, step: int) -> StepWatch | None:
    """Look at this step, if it is one of those to look at."""
    every, optimizer = run.config.log.diagnostics_every, run.trainer.optimizer
    if every is None or step % every or not isinstance(optimizer, AMSF):
        return None
    watch = StepWatch(optimizer)
    watch.before()
    return watch


def _step(run: Run, batches: TrainBatches, step: int) -> tuple[float, Moved]:
    """Do one optimizer step, or skip it if its gradient is not finite.

    Returns:
        Mean loss of this process's sequences, and what became of the step.
    """
    config, world = run.config, run.world
    micro_batches = config.micro_batches(world.size)
    size = config.global_batch_size // (world.size * micro_batches)
    # Dropout draws from here: no generator state needs to be saved for a run to resume exactly.
    seed = np.random.SeedSequence([config.seed, step, world.rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(seed >> np.uint64(1)))
    set_learning_rate(run.trainer.optimizer, config, step)
    loss = torch.zeros((), device=world.device)
    for micro_batch in range(micro_batches):
        first = (micro_batch * world.size + world.rank) * size
        windows = batches.micro_batch(step, first, size).to(world.device)
        loss += run.trainer.backward(windows, last=micro_batch == micro_batches - 1)
    return float(loss), run.trainer.move()
