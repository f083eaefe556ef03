"""Look at the world outside the config before anything is written or launched."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from amsf_dist.train import checkpoint
from amsf_dist.train.config import Config
from amsf_dist.train.errors import UserError
from amsf_dist.train.model import build_model, model_config
from amsf_dist.train.optimizers import build_optimizer, check_amsf
from amsf_dist.train.parallel import choose_device
from amsf_dist.train.text import check_source
from amsf_dist.train.tokens import check_enough_text, load_tokenizer
from amsf_dist.train.trackers import check_trackers
from amsf_dist.train.zero.config import deepspeed_config
from amsf_dist.train.zero.files import require_deepspeed

__all__ = ["check_output", "local_processes", "preflight", "quiet_libraries", "shapes_only"]


def preflight(config: Config, nproc: int) -> None:
    """Check everything that can be checked on one process; nothing is written.

    Args:
        config: the job.
        nproc: number of processes that will run it, on all machines together.

    Raises:
        UserError: for the first thing that would not work.
    """
    try:
        config.micro_batches(nproc)
        config.shards(nproc)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.parallel == "single" and nproc != 1:
        raise UserError(
            f"parallel=single takes one process, got {nproc}; use parallel=fsdp2 or ddp"
        )
    check_trackers(config)
    if config.parallel == "deepspeed":
        require_deepspeed()
    for run in (config, *(config.for_optimizer(name) for name in config.compare)):
        if run.optimizer == "amsf":
            check_amsf(run)
        if run.parallel == "deepspeed":
            deepspeed_config(run, nproc)
        check_output(run)
    check_source(config.data)
    check_enough_text(config, load_tokenizer(config))
    for run in (config, *(config.for_optimizer(name) for name in config.compare)):
        shapes_only(run)


def shapes_only(config: Config) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    """Return the config's model and its optimizer on the meta device: every shape, no memory.

    Raises:
        UserError: if the model or the optimizer refuses the config.
    """
    found = model_config(config, load_tokenizer(config))
    model = build_model(config, found, "meta")
    return model, build_optimizer(config, model)


def local_processes(config: Config) -> int:
    """Return the number of processes to start on this machine.

    Raises:
        UserError: if there are not enough GPUs.
    """
    if config.parallel == "single":
        number = 1
    elif config.nproc == "auto":
        gpus = (
            torch.cuda.device_count() if torch.cuda.is_available() and config.device != "cpu" else 0
        )
        number = max(1, gpus)
    else:
        number = config.nproc
    choose_device(config, number)
    return number


def quiet_libraries() -> None:
    """Leave the terminal to this program: `transformers` reports at its own errors only."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


def check_output(config: Config) -> None:
    """Look at `output_dir`, and at the run that it may hold.

    Raises:
        UserError: if it cannot be written to, or holds a run that this config cannot continue.
    """
    directory = Path(config.output_dir)
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"output_dir: {existing} is a file; give a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output_dir: {existing} is not writable; give another directory")
    found = checkpoint.latest(directory / "checkpoints")
    if found is None:
        return
    if config.resume == "never":
        raise UserError(
            f"output_dir: {directory} holds a run of {found.step} steps and resume=never; "
            "give another output_dir, or resume=auto to continue it"
        )
    checkpoint.check_resumable(found, config)
