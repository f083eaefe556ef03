"""What one process of `amsf train` does: prepare, train, export, then train the baselines."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import typer
import yaml

from amsf_dist.train import checkpoint, stopped
from amsf_dist.train.charts import draw
from amsf_dist.train.config import Config
from amsf_dist.train.export import export_model, sample_text
from amsf_dist.train.heartbeat import beat
from amsf_dist.train.loop import Run, train
from amsf_dist.train.machine import look_around
from amsf_dist.train.model import model_config
from amsf_dist.train.optimizers import LABELS
from amsf_dist.train.parallel import World, join
from amsf_dist.train.preflight import preflight, quiet_libraries
from amsf_dist.train.rehearsal import try_writing
from amsf_dist.train.report import Report, human_bytes
from amsf_dist.train.signals import STOP_FILE, StopRequest
from amsf_dist.train.tokens import Tokens, load_tokenizer, open_tokens, write_tokens
from amsf_dist.train.trainer import Trainer, build_trainer, prepare_trainers

__all__ = ["work"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Summary:
    """summary.json: what a finished run came to.

    Attributes:
        optimizer: name in the config.
        steps: done in all.
        loss: held-out nats per token.
        bits_per_byte: the same, per byte of text.
        seconds: of training since the last resume, evaluation and saving included.
        memory: bytes by owner on the main process, without activations.
    """

    optimizer: str
    steps: int
    loss: float
    bits_per_byte: float
    seconds: float
    memory: dict[str, int]


def work(config: Config, command: str) -> int:
    """Train the config on this process, together with the others there may be.

    Args:
        config: validated; `preflight` is done here unless the launcher has done it.
        command: what the user types to continue, for the messages.

    Returns:
        The exit code: 0 when everything is done, see `stopped` for a job that was asked to stop.

    Raises:
        UserError: for what the user can put right.
    """
    stop = StopRequest()  # first, so that no signal finds the process unprepared
    stopped.tell("nothing")
    quiet_libraries()
    _log_to_terminal(speaks=int(os.environ.get("RANK", 0)) == 0)
    with join(config) as world:
        if STOP_FILE not in os.environ:
            with world.together():
                preflight(config, world.size)
        look_around(config, world)
        try_writing(config, world)
        beat()
        logger.info(
            "%s on %d %s process%s, %s",
            config.parallel,
            world.size,
            world.device.type,
            "es" if world.size > 1 else "",
            config.precision,
        )
        prepare_trainers(config, world)
        tokens = _prepare(config, world)
        summaries = []
        for run_config in (config, *(config.for_optimizer(name) for name in config.compare)):
            summary = _finished(run_config) or _train(
                run_config, tokens, world, stop, command, export=run_config is config
            )
            if summary is None:
                stopped.tell("stopped")
                return stopped.exit_code(stop.reason() is not None, STOP_FILE in os.environ)
            summaries.append(summary)
            if world.is_main:
                draw(Path(config.output_dir))
        if world.is_main:
            _conclude(config, summaries)
    return 0


def _log_to_terminal(speaks: bool) -> None:
    """Show this package's messages on stderr, and leave the root logger to whoever owns it."""
    package = logging.getLogger("amsf_dist")
    package.setLevel(logging.INFO if speaks else logging.WARNING)
    if not package.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)
        package.propagate = False


def _prepare(config: Config, world: World) -> Tokens:
    """Write what all processes read: the tokens. A job that cannot go on here writes nothing."""
    directory = Path(config.output_dir)
    with world.together():
        if world.is_main:
            found = checkpoint.latest(directory / "checkpoints")
            trained_on = found.data_sha256 if found is not None else None
            write_tokens(config, load_tokenizer(config), directory, trained_on)
            values = yaml.safe_dump(config.model_dump(), sort_keys=False)
            (directory / "config.yaml").write_text(values)
    with world.together():
        return open_tokens(config, directory)


def _finished(config: Config) -> _Summary | None:
    """Return the summary of a run that has done its steps before."""
    directory = Path(config.output_dir)
    try:
        summary = _Summary(**json.loads((directory / "summary.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    if summary.steps != config.steps or checkpoint.latest(directory / "checkpoints") is None:
        return None
    logger.info("%s: %d steps were done before", LABELS[config.optimizer], summary.steps)
    return summary


def _train(
    config: Config, tokens: Tokens, world: World, stop: StopRequest, command: str, export: bool
) -> _Summary | None:
    """Train one optimizer to the end and return its summary, or None if it was asked to stop."""
    start = time.perf_counter()
    directory = Path(config.output_dir)
    tokenizer = load_tokenizer(config)
    shape = model_config(config, tokenizer)
    trainer = build_trainer(config, shape, world)
    with world.together():
        first_step = _resume(directory, trainer)
    report = Report(config, LABELS[config.optimizer], first_step, world)
    run = Run(config, world, trainer, tokens, tokenizer, report, stop, directory)
    stopped.tell("training")
    try:
        done, reason = train(run, first_step)
        if reason is None:
            validation = run.validate()
            report.validation(done, validation)
            memory = trainer.memory()
            report.memory(done, memory, trainer.other_memory())
    finally:
        report.close()
    if reason is not None:
        if world.is_main:
            saved = directory / "checkpoints" / f"step_{done:08d}"
            typer.echo(
                f"stopped by {reason} after step {done}; saved {saved}; continue with: {command}"
            )
        return None
    if export:
        export_model(directory, trainer, shape, tokenizer, config, world)
        if world.is_main and config.sample.tokens:
            typer.echo(f"--- sample of {directory / 'model'} ---")
            typer.echo(sample_text(directory / "model", config.sample, config.seed))
            typer.echo("---")
    summary = _Summary(
        optimizer=config.optimizer,
        steps=done,
        loss=validation.loss,
        bits_per_byte=validation.bits_per_byte,
        seconds=time.perf_counter() - start,
        memory=memory,
    )
    if world.is_main:  # last: a run without it is taken up again where it was
        (directory / "summary.json").write_text(json.dumps(asdict(summary), indent=1))
    trainer.close()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    return summary


def _resume(directory: Path, trainer: Trainer) -> int:
    """Load the newest checkpoint, if there is one, and return the steps it has done."""
    found = checkpoint.latest(directory / "checkpoints")
    if found is None:
        return 0
    checkpoint.load(found, trainer.read)
    logger.info("continuing from %s", found.path)
    return found.step


def _conclude(config: Config, summaries: list[_Summary]) -> None:
    """Print the result of every optimizer side by side, and where things lie."""
    typer.echo(f"held-out text after {config.steps} steps, bits per byte (lower is better):")
    for summary in summaries:
        typer.echo(
            f"  {LABELS[summary.optimizer]:<16}{summary.bits_per_byte:8.4f}   "
            f"{human_bytes(sum(summary.memory.values()))} on process 0 without activations, "
            f"{summary.seconds:.0f} s"
        )
    directory = Path(config.output_dir)
    typer.echo(
        f"model {directory / 'model'}, charts {directory / 'loss.png'} {directory / 'memory.png'}"
    )
