"""The finished model as a directory that `transformers` loads: weights at x, tokenizer, config."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from amsf_dist.train import checkpoint
from amsf_dist.train.alone import weights_alone
from amsf_dist.train.config import Config, SampleConfig
from amsf_dist.train.errors import UserError
from amsf_dist.train.model import build_model, model_config
from amsf_dist.train.parallel import World
from amsf_dist.train.tokens import load_tokenizer
from amsf_dist.train.trainer import Trainer

__all__ = ["check_destination", "export_checkpoint", "export_model", "sample_text"]


def check_destination(directory: Path) -> None:
    """Raise a UserError if an export would overwrite something."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"{directory} exists and is not an empty directory; give another name or remove it"
        )


def export_model(
    directory: Path,
    trainer: Trainer,
    found: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    world: World,
) -> None:
    """Write the evaluation weights (x for AMSF) of a finished run; every process must call it.

    The whole model is put together once, in the memory of the main process.

    Args:
        directory: `output_dir`; gets `model`, has the checkpoint of the last step.
        trainer: after that step.
        found: from `model_config`.
        tokenizer: goes with the weights.
        config: of the run.
        world: this process among the others.
    """
    with world.together():
        newest = checkpoint.latest(directory / "checkpoints")
        if newest is None:
            raise UserError(f"{directory}/checkpoints: removed while the run went on; run it again")
    with trainer.whole_weights(newest.path) as weights, world.together():
        if world.is_main:
            _write(directory / "model", weights, found, tokenizer, config)


def export_checkpoint(source: Path, directory: Path) -> int:
    """Export a checkpoint on this process alone, whatever number of processes wrote it.

    Args:
        source: `output_dir` of a run (its newest checkpoint is taken), or one checkpoint.
        directory: to write; must not exist.

    Returns:
        The step of the checkpoint.

    Raises:
        UserError: if there is no such checkpoint, or something is in the way.
    """
    check_destination(directory)
    # transformers imports DeepSpeed where that is installed, which looks for a device, aloud.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    newest = checkpoint.latest(source / "checkpoints")
    found = newest or checkpoint.read(source)
    config = Config.model_validate(found.config)
    tokenizer = load_tokenizer(config)
    shape = model_config(config, tokenizer)
    with contextlib.ExitStack() as held:
        weights = checkpoint.load(
            found, lambda path: held.enter_context(weights_alone(path, config, shape))
        )
        _write(directory, weights, shape, tokenizer, config)
    return found.step


def sample_text(directory: Path, sample: SampleConfig, seed: int) -> str:
    """Load an exported directory as any user would, and let it write."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()
    prompt = tokenizer(sample.prompt, return_tensors="pt", add_special_tokens=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        tokens = model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            max_new_tokens=sample.tokens,
            do_sample=True,
            temperature=0.7,
            top_k=0,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def _write(
    directory: Path,
    weights: dict[str, Any],
    found: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> None:
    temporary = directory.with_name(f"{directory.name}.tmp")
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    # A model without memory of its own takes the gathered tensors, so there is one copy.
    model = build_model(config, found, "meta")
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(temporary, directory)
