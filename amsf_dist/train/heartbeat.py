"""A file whose age says whether the job still moves: for health checks of containers.

`AMSF_HEARTBEAT` names it. The first process of each machine touches it after every step, every
batch of an evaluation, and around a save, so each container is healthy by itself. No thread does
it: a job that hangs must look like one.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["HEARTBEAT", "beat"]

HEARTBEAT = "AMSF_HEARTBEAT"


def beat() -> None:
    """Touch the file, if the environment names one and this process is its machine's first."""
    name = os.environ.get(HEARTBEAT)
    if name and os.environ.get("LOCAL_RANK", "0") == "0":
        # A file that cannot be written gets old, and that says it; training goes on.
        with contextlib.suppress(OSError):
            Path(name).touch()
