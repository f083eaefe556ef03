"""DeepSpeed's JSON file and the job's YAML as one configuration.

The YAML decides what both can say (batch, clipping, precision) and the file must agree, say "auto",
or leave it out; its optimizer is the YAML's. Everything else is the file's.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from amsf_dist.train.config import Config
from amsf_dist.train.errors import UserError, one_line
from amsf_dist.train.optimizers import amsf_options

__all__ = ["deepspeed_config", "read_deepspeed_file", "read_deepspeed_json", "stage_of"]

_LEFT_OUT = (None, "auto")


def deepspeed_config(config: Config, num_processes: int) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`.

    Args:
        config: the job, under `parallel: deepspeed`.
        num_processes: on all machines together.

    Raises:
        UserError: if the file cannot be read, or says something else than the YAML.
    """
    settings = copy.deepcopy(read_deepspeed_file(config))
    stage_of(config, settings)
    micro_batches = config.micro_batches(num_processes)
    clips = config.clip == "norm" or config.optimizer == "adamw"
    limit, said_by = (config.max_grad_norm or 0.0, "max_grad_norm") if clips else (0.0, "clip")
    per_process = config.global_batch_size // num_processes // micro_batches
    agreed = {
        "train_batch_size": (config.global_batch_size, "global_batch_size"),
        "train_micro_batch_size_per_gpu": (per_process, "micro_batch_size"),
        "gradient_accumulation_steps": (micro_batches, "micro_batch_size"),
        # always, for DeepSpeed clips at 1.0 where nothing is said
        "gradient_clipping": (limit, said_by),
        "bf16.enabled": (config.precision == "mixed", "precision"),
        "fp16.enabled": (False, "precision"),
        "torch_autocast.enabled": (False, "precision"),  # bf16 is what `mixed` is here
    }
    for dotted, (value, key) in agreed.items():
        _agree(settings, dotted, value, key, config)
    _check_rest(config, settings)
    settings.pop("optimizer", None)
    if config.optimizer == "amsf":
        settings["optimizer"] = {"type": "AMSF", "params": copy.deepcopy(amsf_options(config))}
    else:
        # torch's AdamW, as under the other engines; offloaded, DeepSpeed wants its own otherwise
        settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    settings.setdefault("steps_per_print", None)  # the job has a progress line of its own
    return settings


def read_deepspeed_file(config: Config) -> dict[str, Any]:
    """Return what the file of `deepspeed` says.

    Raises:
        UserError: if it is missing, or no JSON object.
    """
    return read_deepspeed_json(Path(str(config.deepspeed)))


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Return what a DeepSpeed file says.

    Raises:
        UserError: if it is missing, or no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except FileNotFoundError:
        raise UserError(
            f"deepspeed: {path} does not exist (looked at {path.absolute()}); "
            "give the path of a DeepSpeed JSON file, see configs/deepspeed/"
        ) from None
    except OSError as error:
        raise UserError(
            f"deepspeed: {path}: {error.strerror}; give the path of a DeepSpeed JSON file"
        ) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"deepspeed: {path} {where}: not valid JSON: {error.msg}") from None
    except ValueError as error:  # not UTF-8, or a key given twice
        raise UserError(f"deepspeed: {path}: not valid JSON: {one_line(error, 200)}") from None
    if not isinstance(values, dict):
        raise UserError(f"deepspeed: {path} holds no JSON object; see configs/deepspeed/")
    return values


def stage_of(config: Config, settings: dict[str, Any]) -> int:
    """Return the ZeRO stage: 1, 2 or 3.

    Raises:
        UserError: if it is another one.
    """
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        raise UserError(
            f"deepspeed: {config.deepspeed}: zero_optimization.stage must be 1, 2 or 3, got "
            f"{json.dumps(stage)}; for copies without ZeRO use parallel=ddp"
        )
    return int(stage)


def _agree(settings: dict[str, Any], dotted: str, value: Any, key: str, config: Config) -> None:
    """Put a value of the YAML into the settings, unless they say another one."""
    section, _, name = dotted.rpartition(".")
    if section and settings.get(section) in _LEFT_OUT:
        settings.pop(section, None)
        if not value:
            return
    place = settings.setdefault(section, {}) if section else settings
    given = place.get(name) if isinstance(place, dict) else place
    if not isinstance(place, dict) or (given not in _LEFT_OUT and given != value):
        wanted = json.dumps(getattr(config, key))
        raise UserError(
            f"deepspeed: {config.deepspeed} says {dotted} is {json.dumps(given)}, and {key}="
            f"{wanted} makes it {json.dumps(value)}; leave it out there, or change one of them"
        )
    place[name] = value


def _check_rest(config: Config, settings: dict[str, Any]) -> None:
    """Refuse what the job does itself, in another way.

    Raises:
        UserError: naming the key and the cure.
    """
    optimizer = settings.get("optimizer") or {}
    kind = optimizer.get("type") if isinstance(optimizer, dict) else optimizer
    if kind is not None and str(kind).lower() not in ("amsf", config.optimizer):
        raise UserError(
            f"deepspeed: {config.deepspeed} says optimizer.type is {json.dumps(kind)}, and the job "
            f"has optimizer={config.optimizer}; leave its section out, or say AMSF there"
        )
    if settings.get("scheduler") is not None:
        raise UserError(
            f"deepspeed: {config.deepspeed} has a scheduler; leave it out: AMSF needs none, "
            "and AdamW's is in the adamw section of the YAML"
        )
    if settings["zero_optimization"].get("compute_grad_norm") is False:
        raise UserError(
            f"deepspeed: {config.deepspeed} says zero_optimization.compute_grad_norm is false; "
            "leave it out: the job reports the norm, and skips steps by it"
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} is given twice")
        values[key] = value
    return values
