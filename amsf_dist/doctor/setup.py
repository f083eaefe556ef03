"""What a configuration file asks for: DeepSpeed's JSON, accelerate's YAML, or nothing."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from amsf_dist.doctor.model import Layer
from amsf_dist.train.errors import UserError, one_line

__all__ = ["EXPORTED", "Setup", "needed", "read_setup"]

# Of what `accelerate launch` exports: the rest is about ports, threads and devices.
EXPORTED = ("ACCELERATE_", "FSDP_")
_YAML = (".yaml", ".yml")
_LOCAL = "LOCAL_MACHINE"
# Keys of which a DeepSpeed configuration has one at least.
_DEEPSPEED = (
    "zero_optimization",
    "optimizer",
    "bf16",
    "fp16",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_clipping",
)
_SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")


@dataclass(frozen=True)
class Setup:
    """Which wrapper to try, and how it is told what to do.

    Attributes:
        kind: "plain", "deepspeed" or "accelerate".
        title: the file, or words for none.
        deepspeed: the JSON, where the kind is "deepspeed".
        environment: what `accelerate launch` would export, where the kind is "accelerate".
        processes: None: any number; 1 where the file rules out more.
        on_cpu: the file says so.
    """

    kind: str
    title: str
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    processes: int | None = None
    on_cpu: bool = False

    @property
    def shards(self) -> bool:
        """Whether accelerate is told to use FSDP."""
        return self.environment.get("ACCELERATE_USE_FSDP") == "true"

    @property
    def libraries(self) -> tuple[str, ...]:
        """What the processes will import besides torch."""
        accelerate = ("accelerate",) if self.kind == "accelerate" else ()
        return (*accelerate, *(("deepspeed",) if self.speeds else ()))

    @property
    def freezes(self) -> bool:
        """Whether a parameter may be frozen: FSDP1's flat ones are trained as a whole."""
        told = self.environment.get
        return not (
            self.shards
            and told("FSDP_VERSION") == "1"
            and told("FSDP_USE_ORIG_PARAMS", "false") == "false"
        )

    @property
    def speeds(self) -> bool:
        """Whether DeepSpeed is used, directly or by accelerate."""
        by_accelerate = self.environment.get("ACCELERATE_USE_DEEPSPEED") == "true"
        return self.kind == "deepspeed" or by_accelerate


def needed(name: str, extra: str = "") -> ModuleType:
    """Import an optional package.

    Args:
        name: of the module.
        extra: of amsf_dist that installs it; by default the package's own name.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = extra or name.split(".")[0]
        raise UserError(
            f"this configuration needs {extra}, and importing it says: {error}; "
            f"pip install 'amsf-dist[{extra}]'"
        ) from None


def installed(name: str) -> None:
    """Look for an optional package without importing it.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise UserError(f"this configuration needs {name}; pip install 'amsf-dist[{name}]'")


def read_setup(path: str | Path | None, nproc: int = 2) -> Setup:
    """Read a configuration file.

    Args:
        path: None: torch alone.
        nproc: processes that the trial will have.

    Raises:
        UserError: the file is missing, cannot be read, or is neither of the two kinds.
    """
    if path is None:
        return Setup("plain", "torch alone")
    path = Path(path)
    content = _content(path)
    if "distributed_type" in content or "compute_environment" in content:
        return _accelerate(path, content, nproc)
    if path.suffix in _YAML:
        raise UserError(
            f"{path}: no distributed_type in it, so it is not what `accelerate config` writes; "
            "give such a file, a DeepSpeed JSON, or no file for torch alone"
        )
    if not any(key in content for key in _DEEPSPEED):
        raise UserError(
            f"{path}: none of {', '.join(_DEEPSPEED)} is in it, so it is not a DeepSpeed "
            "configuration; give one, or what `accelerate config` writes"
        )
    _check_sections(path, content)
    installed("deepspeed")
    return Setup("deepspeed", str(path), deepspeed=content)


def _content(path: Path) -> dict[str, Any]:
    """The file's mapping, read by the library that its owner reads it with."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a DeepSpeed JSON or an accelerate YAML")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if path.suffix in _YAML:
        parse = needed("yaml", "accelerate").safe_load
    else:
        parse = needed("hjson", "deepspeed").loads
    try:
        content = parse(text)
    except Exception as error:  # each library has its own
        raise UserError(f"{path}: {one_line(error, 200)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: it must hold keys and values, got {type(content).__name__}")
    return dict(content)


def _check_sections(path: Path, content: Mapping[str, Any]) -> None:
    for key in ("zero_optimization", "optimizer", "bf16", "fp16"):
        if not isinstance(content.get(key, {}), dict):
            raise UserError(f"{path}: {key} must be a section, got {content[key]!r}")


def _accelerate(path: Path, content: Mapping[str, Any], nproc: int) -> Setup:
    """Let accelerate's own launcher say what its file means."""
    kind = str(content.get("distributed_type", "NO"))
    if kind not in _SUPPORTED or content.get("compute_environment", "LOCAL_MACHINE") != _LOCAL:
        raise UserError(
            f"{path}: distributed_type {kind} on {content.get('compute_environment', _LOCAL)} "
            f"cannot be tried here; known are {', '.join(_SUPPORTED)} on {_LOCAL}"
        )
    processes = 1 if kind == "NO" else nproc
    launch = needed("accelerate.commands.launch")
    environments = needed("accelerate.utils.launch")

    if kind == "DEEPSPEED":
        installed("deepspeed")
    section = content.get("deepspeed_config") or {}
    if isinstance(section, dict) and section.get("deepspeed_config_file"):
        file = Path(section["deepspeed_config_file"])
        _check_sections(file, _content(file))
    words = [f"--config_file={path}", f"--num_processes={processes}", "--num_machines=1"]
    words += ["--machine_rank=0", "--main_process_port=0", "--gpu_ids=all", "doctor.py"]
    try:
        args, defaults, from_file = launch._validate_launch_command(
            launch.launch_command_parser().parse_args(words)
        )
        if args.use_deepspeed:
            fields = [*defaults.deepspeed_config, *(["mixed_precision"] if from_file else [])]
            args.deepspeed_fields_from_accelerate_config = ",".join(fields)
            _, found = environments.prepare_deepspeed_cmd_env(args)
        elif args.use_fsdp or args.multi_gpu:
            found = environments.prepare_multi_gpu_env(args)
        else:
            _, found = environments.prepare_simple_launcher_cmd_env(args)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: accelerate says: {one_line(error, 300)}") from None
    exported = {key: value for key, value in found.items() if key.startswith(EXPORTED)}
    return Setup(
        "accelerate",
        str(path),
        environment=_fitted(exported),
        processes=processes if kind == "NO" else None,
        on_cpu=bool(content.get("use_cpu")),
    )


def _fitted(environment: Mapping[str, str]) -> dict[str, str]:
    """The class and the sizes of the tiny model in place of the real one's."""
    fitted = dict(environment)
    fitted.pop("FSDP_IGNORED_MODULES", None)
    if "FSDP_TRANSFORMER_CLS_TO_WRAP" in fitted:
        fitted["FSDP_TRANSFORMER_CLS_TO_WRAP"] = Layer.__name__
    if float(fitted.get("FSDP_MIN_NUM_PARAMS", 0)) > 0:  # older versions write a float
        fitted["FSDP_MIN_NUM_PARAMS"] = "500"
    return fitted
