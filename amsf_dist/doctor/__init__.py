"""The doctor: does the wrapper that this configuration chooses train as it should?

Silent failures are what it looks for: another optimizer in AMSF's place, steps counted twice,
evaluation weights that never reach the model. It trains a tiny model for three steps under the
user's own DeepSpeed or accelerate configuration, and compares with a plain fp64 reference. In
reading order: `setup` (what the file asks for), `trial` (fitted to three steps), `under_*` (one per
library), `reference`, `checks`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from amsf_dist.doctor.processes import examine_here, in_processes
from amsf_dist.doctor.report import Finding, Report, row
from amsf_dist.doctor.setup import Setup, read_setup
from amsf_dist.doctor.wrapped import Factory
from amsf_dist.optimizer import AMSF

__all__ = ["Finding", "Report", "Setup", "examine", "examine_here", "read_setup", "row"]


def examine(
    config: str | Path | None = None,
    *,
    nproc: int = 2,
    factory: Factory = AMSF,
    timeout: float = 60.0,
    starts: Callable[[str], None] = lambda title: None,
    tells: Callable[[Finding], None] = lambda finding: None,
) -> Report:
    """Examine the wrapper that a configuration chooses, in processes of its own.

    Args:
        config: DeepSpeed's JSON, what `accelerate config` writes, or None for torch alone.
        nproc: number of local processes; GPUs are used if there are as many.
        factory: makes the optimizer of a model, or of parameters, and AMSF's arguments; importable
            by name.
        timeout: seconds that one collective may take, and three times that one check.
        starts: called with the report's title before anything is started.
        tells: called with every answer as it comes.

    Raises:
        UserError: the file cannot be read, or a library that it needs is not installed.
    """
    setup = read_setup(config, nproc)
    nproc = setup.processes or nproc
    gpus = 0 if setup.on_cpu or not torch.cuda.is_available() else torch.cuda.device_count()
    device_type = "cuda" if gpus >= nproc else "cpu"
    words = "process" if nproc == 1 else "processes"
    title = f"{setup.title}: {nproc} {words} on {'GPUs' if device_type == 'cuda' else 'the CPU'}"
    starts(title)
    findings, log = in_processes(setup, factory, nproc, device_type, timeout, tells)
    return Report(title, findings, log)
