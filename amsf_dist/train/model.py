"""The model of a config: a `transformers` causal language model, new or from a local directory."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from amsf_dist.train.config import Config
from amsf_dist.train.config_file import did_you_mean
from amsf_dist.train.errors import UserError, one_line

__all__ = [
    "build_model",
    "decoder_layers",
    "model_config",
    "model_directory",
    "sharding_units",
    "weights_dtype",
]

VOCABULARY_MULTIPLE = (
    64  # a new model's vocabulary is rounded up: rows that divide evenly over shards
)


def weights_dtype(config: Config) -> torch.dtype:
    """Return the dtype of the parameters that the optimizer sees."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def model_config(config: Config, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Return the `transformers` configuration of the model.

    Args:
        config: the job.
        tokenizer: a new model gets at least a row for each of its tokens, and its special tokens.

    Raises:
        UserError: for an unknown architecture or key, a missing directory, a vocabulary that is too
            small, or sequences longer than the model's positions.
    """
    vocabulary = len(tokenizer)
    found = _saved(config) if config.model.path is not None else _new(config, tokenizer)
    text = found.get_text_config(decoder=True)
    if text.vocab_size < vocabulary:
        raise UserError(
            f"model: vocab_size is {text.vocab_size} and the tokenizer has {vocabulary} tokens; "
            "raise model.config.vocab_size or leave it out"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and positions < config.data.sequence_length:
        raise UserError(
            f"data.sequence_length is {config.data.sequence_length} and the model has "
            f"max_position_embeddings={positions}; shorten the one or raise the other"
        )
    return found


def build_model(
    config: Config,
    found: PretrainedConfig,
    device: str,
    hollow: contextlib.AbstractContextManager[Any] | None = None,
) -> PreTrainedModel:
    """Build the model in the dtype of the config; the same seed gives the same weights everywhere.

    Args:
        config: the job.
        found: from `model_config`.
        device: `cpu` for real weights, `meta` for shapes only.
        hollow: context that takes the numbers away as modules are made (`deepspeed.zero.Init`);
            weights are then neither drawn nor read.

    Raises:
        UserError: if `transformers` refuses the configuration or the directory.
    """
    dtype = weights_dtype(config)
    try:
        with contextlib.ExitStack() as within:
            within.enter_context(torch.device(device))
            within.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(config.seed)
            if hollow is not None:
                within.enter_context(_without_drawing())
                within.enter_context(hollow)
            if config.model.path is not None and device != "meta" and hollow is None:
                model = AutoModelForCausalLM.from_pretrained(
                    config.model.path, config=found, dtype=dtype, local_files_only=True
                )
            else:
                model = AutoModelForCausalLM.from_config(found, dtype=dtype)
    except UserError:
        raise
    except Exception as error:
        where = "model.config" if config.model.path is None else f"model.path: {config.model.path}"
        raise UserError(f"{where}: transformers refuses it: {one_line(error, 300)}") from error
    if hollow is not None:
        model.tie_weights()  # left out with the drawing
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the blocks that must stay whole: what `transformers` itself says must not be split."""
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if layers:
        return layers
    stacks = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=len, default=[])


def sharding_units(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that FSDP2 shards on their own, before the model itself.

    Embedding and head are units, unless they are tied: one parameter belongs to one unit, and then
    they stay in the root's.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = head is not None and head.weight is not embedding.weight
    return [*([embedding, head] if apart else []), *decoder_layers(model)]


def model_directory(config: Config) -> Path:
    """Return `model.path`.

    Raises:
        UserError: if it is not the directory of a model.
    """
    path = Path(str(config.model.path))
    if not (path / "config.json").is_file():
        found = "holds no config.json" if path.is_dir() else "is not a directory"
        raise UserError(
            f"model.path: {path} {found} (looked at {path.absolute()}); "
            "give a directory written by save_pretrained"
        )
    return path


def _saved(config: Config) -> PretrainedConfig:
    path = model_directory(config)
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise UserError(f"model.path: {path} holds no weights (*.safetensors); copy them there")
    try:
        found = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise UserError(f"model.path: {path}/config.json: {one_line(error, 300)}") from None
    _check_type(found.model_type, f"model.path: {path}")
    return found


def _new(config: Config, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    architecture = config.model.type or "llama"
    _check_type(architecture, "model.type")
    defaults = AutoConfig.for_model(architecture)
    known = {name for name in {**vars(defaults), **defaults.to_dict()} if not name.startswith("_")}
    if "rope_parameters" in known:  # transformers 5 keeps it in there, and takes it as before
        known.add("rope_theta")
    for key in config.model.config:
        if key not in known and key not in defaults.attribute_map:
            raise UserError(
                f"model.config: unknown key {key} for {architecture}; {did_you_mean(key, known)}"
            )
    # No pad token: its row of the embedding would stay zero, and it is the end of text here.
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    rounded = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    values: dict[str, Any] = {"vocab_size": rounded, **special, **config.model.config}
    try:
        found = AutoConfig.for_model(architecture, **values)
    except Exception as error:
        raise UserError(
            f"model.config: {architecture} refuses it: "
            f"{one_line(str(error).rpartition('ValueError: ')[2], 300)}"
        ) from None
    heads = getattr(found, "num_attention_heads", None)
    groups = getattr(found, "num_key_value_heads", None)
    if heads and groups and heads % groups:
        raise UserError(
            f"model.config: num_attention_heads ({heads}) must be a multiple of "
            f"num_key_value_heads ({groups})"
        )
    return found


def _without_drawing() -> contextlib.AbstractContextManager[Any]:
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # before transformers 5
        from transformers.modeling_utils import (  # type: ignore[attr-defined,no-redef]
            no_init_weights,
        )
    context: contextlib.AbstractContextManager[Any] = no_init_weights()
    return context


def _check_type(name: str, where: str) -> None:
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = did_you_mean(name, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        hint = hint if hint.startswith("did") else "for example llama, qwen3, gpt2, mistral"
        raise UserError(
            f"{where}: {name} is not a causal language model that transformers knows; {hint}"
        )
