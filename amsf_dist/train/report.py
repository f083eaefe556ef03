"""What the main process tells while it trains: a progress bar, a metrics file, trackers."""

from __future__ import annotations

import logging
import math
import os
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from amsf_dist.diagnostics import Figures, StepWatch
from amsf_dist.train.config import Config
from amsf_dist.train.evaluation import Validation
from amsf_dist.train.metrics import MetricsFile
from amsf_dist.train.parallel import World
from amsf_dist.train.trackers import open_trackers

__all__ = ["Report", "human_bytes", "process_memory"]

logger = logging.getLogger(__name__)


class Report:
    """One run's figures. On other processes than the main one it is silent and writes nothing."""

    def __init__(self, config: Config, label: str, done_steps: int, world: World) -> None:
        """Open the files and the bar.

        Args:
            config: of this run.
            label: shown before the bar.
            done_steps: steps that a checkpoint holds already.
            world: this process among the others.
        """
        self._config = config
        self._label = label
        self._device = world.device
        self._speaks = world.is_main
        self._seconds, self._steps = 0.0, 0
        self._bar: tqdm[Any] | None = None
        if not self._speaks:
            return
        directory = Path(config.output_dir)
        self._metrics = MetricsFile(directory / "metrics.jsonl", done_steps)
        self._trackers = open_trackers(config, directory, done_steps)
        if sys.stderr.isatty():
            # A terminal that does not know its size says 0, which tqdm takes for "show nothing".
            size_known = all(os.get_terminal_size(sys.stderr.fileno()))
            self._bar = tqdm(
                total=config.steps,
                initial=done_steps,
                desc=label,
                unit="step",
                dynamic_ncols=size_known,
                ncols=None if size_known else 100,
                nrows=None if size_known else 24,
            )

    def step(self, done: int, seconds: float, **values: float) -> None:
        """Tell of a finished step; every `log.every`-th is written, with the speed since the last.

        Args:
            done: steps done.
            seconds: that this step took, without evaluation and saving.
            **values: `loss`, `grad_norm`, `lr`, `skipped_steps`.
        """
        if not self._speaks:
            return
        config = self._config
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1
        tokens_per_step = config.global_batch_size * config.data.sequence_length
        speed = self._steps * tokens_per_step / self._seconds
        memory = process_memory(self._device)
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {values['loss']:.3f}, {speed:,.0f} tokens/s, {human_bytes(memory)}",
                refresh=False,
            )
            self._bar.update()
        if done % config.log.every and done != config.steps:
            return
        values |= {"tokens_per_second": speed, "memory": memory}
        self._metrics.write("train", done, **values, tokens=done * tokens_per_step)
        self._track(done, {f"train/{name}": value for name, value in values.items()})
        if self._bar is None:
            remaining = (config.steps - done) * self._seconds / self._steps
            logger.info(
                "%s step %d/%d  loss %.4f  %s tokens/s  %s left  %s",
                self._label,
                done,
                config.steps,
                values["loss"],
                f"{speed:,.0f}",
                tqdm.format_interval(remaining),
                human_bytes(memory),
            )
        self._seconds, self._steps = 0.0, 0

    def validation(self, done: int, result: Validation) -> None:
        """Tell of an evaluation."""
        if not self._speaks:
            return
        self._metrics.write(
            "validation", done, loss=result.loss, bits_per_byte=result.bits_per_byte
        )
        self._track(
            done, {"validation/loss": result.loss, "validation/bits_per_byte": result.bits_per_byte}
        )
        self.say(
            f"{self._label} step {done}/{self._config.steps}  "
            f"validation {result.bits_per_byte:.4f} bits/byte (loss {result.loss:.4f})"
        )

    def optimizer(self, done: int, total: Figures, watch: StepWatch) -> None:
        """Tell how the optimizer's step went; see `amsf_dist.diagnostics`.

        Args:
            done: steps done.
            total: of all parameters.
            watch: of the step; what was stale goes into the file, by parameter and by block.
        """
        if not self._speaks:
            return
        values = asdict(total)
        stale = {name: figures.stale for name, figures in watch.by_parameter.items()}
        blocks = {name: asdict(spread) for name, spread in watch.stale_by_block.items()}
        more = {"stale_by_parameter": stale, "stale_by_block": blocks}
        self._metrics.write("optimizer", done, **values, **more)
        self._track(done, {f"optimizer/{name}": value for name, value in values.items()})

    def memory(self, done: int, owners: dict[str, int], others: dict[str, dict[str, int]]) -> None:
        """Write the bytes by owner on the main process, and of what could be in its place."""
        if self._speaks:
            self._metrics.write("memory", done, owners=owners, others=others)
            self._track(done, {f"memory/{owner}": float(size) for owner, size in owners.items()})

    def say(self, text: str) -> None:
        """Log a line above the bar."""
        if not self._speaks:
            return
        if self._bar is None:
            logger.info(text)
        else:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Close the files and leave the bar where it is."""
        if not self._speaks:
            return
        if self._bar is not None:
            self._bar.close()
        for tracker in self._trackers:
            tracker.close()
        self._metrics.close()

    def _track(self, step: int, values: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.write(
                step, {name: value for name, value in values.items() if math.isfinite(value)}
            )


def process_memory(device: torch.device) -> int:
    """Return the highest number of bytes so far: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def human_bytes(count: float) -> str:
    """Return a count of bytes as people read it: `1.5 GB`, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
