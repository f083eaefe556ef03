"""`amsf memory MODEL`: the table of optimizers for a model that need not exist on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from amsf_dist.estimate import (
    ENGINES,
    RELEASING,
    Buffers,
    Cluster,
    Row,
    Structure,
    read_structure,
    rows_for,
)
from amsf_dist.train.config_file import did_you_mean, load_config
from amsf_dist.train.errors import UserError, one_line
from amsf_dist.train.known_models import KNOWN_MODELS
from amsf_dist.train.model import decoder_layers, model_config, sharding_units
from amsf_dist.train.report import human_bytes
from amsf_dist.train.tokens import load_tokenizer
from amsf_dist.train.zero.config import read_deepspeed_json

__all__ = ["COLUMNS", "Estimate", "estimate", "is_job", "structure_of"]

COLUMNS: dict[str, tuple[str, ...]] = {
    "weights": ("weights",),
    "beside": ("masters", "error_bits"),
    "state": ("gap", "exp_avg"),
    "v": ("exp_avg_sq", "v"),
    "gradients": ("gradients",),
    "gathered": ("gathered",),
    "reduced": ("reduced",),
}
"""Column of the table -> owners."""
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def is_job(name: str) -> bool:
    """Whether what the user names is a training job's YAML."""
    return Path(name).suffix in (".yaml", ".yml")


def structure_of(name: str, overrides: Sequence[str] = (), engine: str = "fsdp2") -> Structure:
    """Build a model's shapes on the meta device; nothing is downloaded and no weights are made.

    Args:
        name: a job's YAML, a directory with a config.json, the file itself, or one of
            `KNOWN_MODELS`.
        overrides: `key=value` of the job.
        engine: FSDP1 wraps decoder layers, FSDP2 embedding and head too.

    Raises:
        UserError: there is no such model, or `transformers` refuses it.
    """
    if is_job(name):
        job = load_config(name, list(overrides))
        found = model_config(job, load_tokenizer(job))
    elif overrides:
        raise UserError(f"{overrides[0]}: keys can be changed where MODEL is the YAML of a job")
    else:
        found = _configuration(name)
    try:
        with torch.device("meta"):
            model = _class(found).from_config(found, dtype=torch.float32)
    except Exception as error:
        raise UserError(f"{name}: transformers refuses it: {one_line(error, 300)}") from None
    return read_structure(model, (decoder_layers if engine == "fsdp1" else sharding_units)(model))


@dataclass(frozen=True)
class Estimate:
    """The answer.

    Attributes:
        model: as the user named it.
        engine: one of `amsf_dist.estimate.ENGINES`.
        gpus: processes.
        replicas: of all shards together.
        dtype: "bf16" or "fp32".
        parameters: of the model.
        rows: one per optimizer.
        release: whether FlashAdamW and AMSF release gradients.
    """

    model: str
    engine: str
    gpus: int
    replicas: int
    dtype: str
    parameters: int
    rows: tuple[Row, ...]
    release: bool = False

    def as_json(self) -> str:
        """One object: bytes by owner and row."""
        rows = [{**vars(row), "total": row.total} for row in self.rows]
        return json.dumps({**vars(self), "rows": rows}, indent=1)

    def __str__(self) -> str:
        """The table."""
        shown = [name for name, owners in COLUMNS.items() if self._has(owners)]
        width = max(len(row.name) for row in self.rows) + 1
        head = [*shown, "total", "B/param"]
        lines = [" " * width + "".join(name.rjust(11) for name in head)]
        for row in self.rows:
            sizes = [sum(row.owners.get(owner, 0) for owner in COLUMNS[name]) for name in shown]
            cells = [human_bytes(size) if size else "-" for size in (*sizes, row.total)]
            cells.append(f"{row.per_parameter:.2f}")
            lines.append(row.name.ljust(width) + "".join(cell.rjust(11) for cell in cells))
        return "\n".join([self._title(), "", *lines, "", *self._notes()])

    def _has(self, owners: Sequence[str]) -> bool:
        return any(row.owners.get(owner) for row in self.rows for owner in owners)

    def _title(self) -> str:
        where = f"{self.engine} on {self.gpus} GPUs" if self.gpus > 1 else f"{self.engine}, one GPU"
        where += f", {self.replicas} replicas" if self.replicas > 1 else ""
        return f"{self.model}: {self.parameters:,} parameters, {where}, {self.dtype}"

    def _notes(self) -> list[str]:
        notes = ["each GPU at the fullest moment of a step, without activations (docs/memory.md)"]
        if gathered := max(row.gathered for row in self.rows):
            notes.append(f"weights gathered at once: {human_bytes(gathered)}, not always then")
        if self.dtype == "bf16" and self.engine.startswith("zero"):
            notes.append("bf16 weights; the optimizer moves fp32 masters")
        elif self.dtype == "bf16":
            notes.append("AdamW, Adam-mini and AMSF fp32: fp32 weights and bf16 arithmetic")
        if self.release:
            notes.append("FlashAdamW and AMSF with gradient release (docs/release.md)")
        notes.append("B/param: total by the parameters that a GPU updates")
        return notes


def estimate(
    model: str,
    overrides: Sequence[str] = (),
    engine: str | None = None,
    gpus: int | None = None,
    replicas: int = 1,
    dtype: str | None = None,
    deepspeed: str | None = None,
    release: bool = False,
) -> Estimate:
    """Work out the table.

    Args:
        model: see `structure_of`.
        overrides: see `structure_of`.
        engine: None: fsdp2.
        gpus: None: 8, or 1 for single.
        replicas: of all shards together (HSDP).
        dtype: "bf16" or "fp32"; None: bf16.
        deepspeed: DeepSpeed's JSON file, for the sizes of its buffers; None: its defaults.
        release: gradient release, see `rows_for`.

    Raises:
        UserError: an option is wrong, there is no such model, or it cannot be read.
    """
    engine, dtype = engine or "fsdp2", dtype or "bf16"
    gpus = gpus or (1 if engine == "single" else 8)
    if dtype not in _DTYPES:
        raise UserError(f"--dtype must be {' or '.join(_DTYPES)}, got {dtype}")
    if engine not in ENGINES:
        raise UserError(f"--engine must be one of {', '.join(ENGINES)}; got {engine}")
    if release and engine not in RELEASING:
        raise UserError(f"--release works with --engine {' or '.join(RELEASING)}, not {engine}")
    buffers = Buffers() if deepspeed is None else _buffers(deepspeed, engine)
    cluster = Cluster(gpus, replicas, buffers)
    structure = structure_of(model, overrides, engine)
    try:
        rows = rows_for(structure, engine, cluster, _DTYPES[dtype], release)
    except ValueError as error:
        raise UserError(f"{model}: {error}") from None
    return Estimate(model, engine, gpus, replicas, dtype, structure.numel, tuple(rows), release)


def _buffers(file: str, engine: str) -> Buffers:
    if not engine.startswith("zero"):
        raise UserError(f"--deepspeed goes with --engine zero1, zero2 or zero3, not {engine}")
    section = read_deepspeed_json(Path(file)).get("zero_optimization", {})
    for key in ("offload_optimizer", "offload_param"):
        if (section.get(key) or {}).get("device", "none") != "none":
            raise UserError(f"{file}: zero_optimization.{key} is not predicted; leave it out")
    try:
        return Buffers.of(section)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: zero_optimization: {one_line(error)}") from None


def _configuration(name: str) -> PretrainedConfig:
    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{file} does not exist; give a model's directory or its config.json")
        try:
            return AutoConfig.from_pretrained(file, local_files_only=True)
        except Exception as error:
            raise UserError(f"{file}: {one_line(error, 300)}") from None
    if name.lower() not in KNOWN_MODELS:
        hint = did_you_mean(name.lower(), KNOWN_MODELS).replace("known keys", "known by name")
        raise UserError(
            f"{name} is no directory, no .json, no .yaml and no model known by name; {hint}"
        )
    kind, values = KNOWN_MODELS[name.lower()]
    return AutoConfig.for_model(kind, **values)


def _class(found: PretrainedConfig) -> type[AutoModel] | type[AutoModelForCausalLM]:
    known = found.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if known else AutoModel
