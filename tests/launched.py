"""Run a launch script with no variables of its own but those given."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
OF_THEIR_OWN = (
    "NPROC_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT LOCAL_ADDR HOSTFILE JOB_ID "
    "RDZV_TIMEOUT MAX_RESTARTS GPUS SHM_SIZE MEMLOCK RUN_AS NETWORK NAME RUNS CACHE DOCKER "
    "DOCKER_FLAGS IMAGE DEVICE "
    "CLAIM KUBECTL CPUS MEMORY AMSF_HEARTBEAT"
).split()


def start(script: str, *words: str, settings: str = "", **options: Any) -> tuple[int, str, str]:
    """Run a script with variables such as `NNODES=2` and no others of its own."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in OF_THEIR_OWN and not key.startswith(("SLURM", "NCCL", "GLOO"))
    }
    environment |= dict(pair.split("=", 1) for pair in settings.split())
    environment["PYTHON"] = "py"  # there is none: a dry run must not miss it
    done = subprocess.run(
        [str(LAUNCH / script), *words], capture_output=True, text=True, env=environment, **options
    )
    return done.returncode, done.stdout, done.stderr
