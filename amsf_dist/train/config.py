"""What a config file may say: names, types, ranges, and the combinations that make sense.

Nothing here touches the disk, the model or torch; `preflight` looks at the world outside the file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "AccumulationConfig",
    "AdamWConfig",
    "Config",
    "DataConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerName",
    "SampleConfig",
]

OptimizerName = Literal["amsf", "adamw"]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Section(BaseModel):
    """Strict and closed: `"8"` is not a number, an unknown key is a mistake, nothing changes."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class ModelConfig(_Section):
    """A `transformers` language model: new (`type`, `config`) or from a directory (`path`)."""

    path: str | None = None
    """Directory written by `save_pretrained`, to fine-tune. Excludes `type` and `config`."""
    type: str | None = None
    """`model_type` of a decoder-only architecture that `transformers` knows; null: llama."""
    config: dict[str, Any] = {}
    """Arguments of that architecture's configuration class, verbatim."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        given = [name for name in ("type", "config") if getattr(self, name)]
        if self.path is not None and given:
            raise ValueError(
                f"path and {' and '.join(given)} exclude each other; "
                "keep path to fine-tune a directory, or type and config to start anew"
            )
        return self


class DataConfig(_Section):
    """Where the text comes from and how it is cut."""

    path: str | None = None
    """Text file, folder of them, or `datasets` directory; null: the documentation in CPython."""
    tokenizer: Annotated[str, Field(min_length=1)] = "auto"
    """`bytes`: a token a byte; `model`: from `model.path`; `auto`: `model` if there is a path,
    else `bytes`; anything else: the directory of a tokenizer."""
    column: str = "text"
    """Column of a `datasets` directory."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens a sequence."""
    validation_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.05
    """The last part of the tokens is held out."""


class AdamWConfig(_Section):
    """`torch.optim.AdamW` under a linear warmup and a cosine: the baseline."""

    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    decay: Literal["matrices", "all"] = "matrices"
    """`matrices`: no decay on parameters with fewer than two dimensions."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_lr_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Learning rate at the last step, as a part of `lr`."""


class AccumulationConfig(_Section):
    """The micro-batches of a step, and what becomes of their gradients (docs/release.md)."""

    steps: Count | None = None
    """Micro-batches a step; null: as `micro_batch_size` has it."""
    mode: Literal["exact", "state"] = "exact"
    """`exact`: gradients add up. `state`: into AMSF's state, which needs no memory and is not quite
    the same; with `release`."""


class LogConfig(_Section):
    """Where the figures go besides metrics.jsonl."""

    every: Count = 10
    """Steps between two lines of metrics.jsonl (and of the log, where there is no terminal)."""
    tensorboard: bool = False
    wandb: bool = False
    prometheus_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Rank 0 answers Prometheus on this port; null: nothing listens."""
    prometheus_host: str = "127.0.0.1"
    """The address it listens on; 0.0.0.0 for other machines too (there is no password)."""
    diagnostics_every: Count | None = 100
    """Steps between two looks at how AMSF moves the weights (kind `optimizer`); null: none."""


class SampleConfig(_Section):
    """The text that the exported model writes at the end."""

    prompt: Annotated[str, Field(min_length=1)] = "The "
    tokens: Annotated[int, Field(ge=0)] = 200
    """0: no sample."""


class Config(_Section):
    """One training job. `docs` of each key stand below it."""

    output_dir: Annotated[str, Field(min_length=1)]
    """Everything that the job writes lies in here."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    resume: Literal["auto", "never"] = "auto"
    """`auto`: continue from the newest complete checkpoint in output_dir, if there is one."""

    nproc: Count | Literal["auto"] = "auto"
    """Processes on this machine; `auto`: one per GPU, or one. Under torchrun, torchrun decides."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: cuda (NCCL) if there is a GPU for every process, otherwise cpu (gloo)."""
    parallel: Literal["fsdp2", "ddp", "single", "deepspeed"] = "fsdp2"
    shard_degree: Count | None = None
    """Processes that share one copy of the model, for fsdp2; there are several copies then (HSDP).
    null: all processes share one."""
    deepspeed: str | None = None
    """DeepSpeed's JSON file, for `parallel: deepspeed`; what this file says too must agree."""
    precision: Literal["fp32", "mixed", "bf16"] = "fp32"
    """`mixed`: fp32 weights, bf16 arithmetic. `bf16`: bf16 weights too (AMSF only)."""
    activation_checkpointing: bool = False
    sync_every_micro_batch: bool = True
    """False: fewer messages while accumulating, but a whole unsharded gradient in memory. For
    fsdp2; DeepSpeed's stages do as they do."""
    timeout_minutes: Annotated[float, Field(gt=0.0)] = 10.0
    """How long a process waits for the others before it gives up."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()

    optimizer: OptimizerName = "amsf"
    amsf: dict[str, Any] = {}
    """Arguments of `amsf_dist.AMSF`, verbatim."""
    adamw: AdamWConfig = AdamWConfig()
    compare: list[OptimizerName] = []
    """Trained after the main run on the same batches, under output_dir/<name>."""

    steps: Count
    global_batch_size: Count
    """Sequences a step, over all processes."""
    micro_batch_size: Count | None = None
    """Sequences a process holds at once; null: as `accumulation` has it."""
    accumulation: AccumulationConfig = AccumulationConfig()
    release: bool = False
    """Every unit's weights move inside backward and its gradients are freed (AMSF, fsdp2 or
    single)."""
    clip: Literal["norm", "block", "tensor"] = "norm"
    """Of AMSF: by the norm of all gradients, or block by block, or parameter by parameter."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Limit of `clip: norm`, and AdamW's in any case; null: none."""

    eval_every: Count = 100
    eval_batches: Count | None = None
    """Global batches of held-out text an evaluation; null: all of it."""
    save_every: Count = 1000
    keep_checkpoints: Count = 2
    log: LogConfig = LogConfig()
    sample: SampleConfig = SampleConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if self.parallel == "single" and self.nproc not in ("auto", 1):
            raise ValueError(f"parallel=single takes nproc=1, got nproc={self.nproc}")
        if self.shard_degree is not None and self.parallel != "fsdp2":
            raise ValueError(
                f"shard_degree={self.shard_degree} goes with parallel=fsdp2; parallel="
                f"{self.parallel} needs shard_degree=null"
            )
        if self.parallel == "deepspeed" and not self.deepspeed:
            raise ValueError(
                "parallel=deepspeed needs deepspeed, the path of its JSON file; "
                "for example deepspeed=configs/deepspeed/zero3.json"
            )
        if self.parallel == "deepspeed" and self.precision == "bf16":
            raise ValueError(
                "precision=bf16 does not go with parallel=deepspeed, which keeps fp32 weights "
                "beside those in bf16; use precision=mixed"
            )
        self._check_release()
        if self.parallel == "deepspeed" and self.clip == "tensor":
            raise ValueError(
                "clip=tensor goes by the norm of every parameter, and DeepSpeed joins them; "
                "use clip=block or norm"
            )
        for key in ("clip", "max_norm"):
            if key in self.amsf:
                raise ValueError(
                    f"amsf.{key}={self.amsf[key]}: the job clips; say clip and max_grad_norm "
                    "beside steps"
                )
        if self.optimizer in self.compare:
            raise ValueError(
                f"compare holds {self.optimizer}, which is the optimizer already; "
                "remove it from compare"
            )
        if len(set(self.compare)) < len(self.compare):
            raise ValueError(f"compare names an optimizer twice: {', '.join(self.compare)}")
        if self.data.tokenizer == "model" and self.model.path is None:
            raise ValueError("data.tokenizer=model needs model.path; for a new model use bytes")
        if "adamw" in (self.optimizer, *self.compare) and self.adamw.warmup_steps >= self.steps:
            raise ValueError(
                f"adamw.warmup_steps must be below steps ({self.steps}), "
                f"got {self.adamw.warmup_steps}"
            )
        if self.precision == "bf16" and self.optimizer == "adamw":
            raise ValueError(
                "precision=bf16 leaves AdamW with bf16 weights that go stale; use precision=mixed"
            )
        if isinstance(self.nproc, int):
            self.micro_batches(self.nproc)
            self.shards(self.nproc)
        return self

    def _check_release(self) -> None:
        if self.accumulation.mode == "state" and not self.release:
            raise ValueError(
                "accumulation.mode=state is a part of gradient release; set release=true, "
                "or accumulation.mode=exact"
            )
        if not self.release:
            return
        ways_out = {
            "ddp": "shows gradients before they are reduced; use parallel=fsdp2",
            "deepspeed": "keeps gradients in buffers of its own; use parallel=fsdp2",
        }
        if self.parallel in ways_out:
            raise ValueError(
                f"release=true: parallel={self.parallel} {ways_out[self.parallel]}, "
                "or release=false"
            )
        if self.optimizer != "amsf":
            raise ValueError(f"release=true: optimizer={self.optimizer} cannot; use release=false")

    def shards(self, num_processes: int) -> int:
        """Return how many of so many processes share a copy of the model.

        Raises:
            ValueError: copies would not be whole.
        """
        if self.parallel != "fsdp2":
            return 1
        degree = self.shard_degree or num_processes
        if num_processes % degree:
            raise ValueError(
                f"the number of processes ({num_processes}) must be a multiple of shard_degree "
                f"({degree})"
            )
        return degree

    def micro_batches(self, num_processes: int) -> int:
        """Return the number of micro-batches a step, for a number of processes.

        Raises:
            ValueError: if the global batch does not divide evenly, or two keys disagree.
        """
        per_process, rest = divmod(self.global_batch_size, num_processes)
        if rest:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of the number "
                f"of processes ({num_processes}); "
                f"e.g. global_batch_size={max(1, per_process) * num_processes}"
            )
        steps = self.accumulation.steps
        if steps is not None and per_process % steps:
            raise ValueError(
                f"accumulation.steps ({steps}) must divide the {per_process} sequences that each "
                f"of {num_processes} processes holds of global_batch_size "
                f"({self.global_batch_size}); e.g. accumulation.steps={per_process}"
            )
        size = self.micro_batch_size or per_process // (steps or 1)
        micro_batches, rest = divmod(per_process, size)
        if rest or not micro_batches:
            raise ValueError(
                f"micro_batch_size ({self.micro_batch_size}) must divide the {per_process} "
                f"sequences that each of {num_processes} processes holds of global_batch_size "
                f"({self.global_batch_size}); "
                f"e.g. micro_batch_size={per_process}"
            )
        if steps not in (None, micro_batches):
            raise ValueError(
                f"accumulation.steps={steps} and micro_batch_size={self.micro_batch_size} disagree "
                f"on {num_processes} processes: the latter makes {micro_batches} micro-batches; "
                "leave one of them out"
            )
        return micro_batches

    @property
    def tokenizer_directory(self) -> str | None:
        """Where the tokenizer lies; None: bytes."""
        name = self.data.tokenizer
        if name in ("auto", "model"):
            return self.model.path
        return None if name == "bytes" else name

    def for_optimizer(self, name: OptimizerName) -> Config:
        """Return the same job with another optimizer, in its own folder below this one's.

        AdamW cannot train bf16 weights (they go stale), so a bf16 job is compared with the mixed
        precision that people run.
        """
        changes: dict[str, Any] = {
            "optimizer": name,
            "compare": [],
            "output_dir": f"{self.output_dir}/{name}",
        }
        if name == "adamw":  # it takes the ordinary step
            steps = self.accumulation.steps
            changes |= {"release": False, "accumulation": AccumulationConfig(steps=steps)}
        if name == "adamw" and self.precision == "bf16":
            changes["precision"] = "mixed"
        return self.model_copy(update=changes)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be continued; the rest may change between runs."""
        keys = {"seed", "model", "optimizer", "global_batch_size", "max_grad_norm", "precision"}
        if self.optimizer == "amsf":
            keys.add("clip")
        known = self.model_dump(include=keys | {self.optimizer})
        known["data"] = self.data.model_dump(exclude={"path"})  # its content counts, not its name
        if self.optimizer == "adamw":
            known["steps"] = (
                self.steps
            )  # the cosine ends there; a Schedule-Free run may be prolonged
        return known
