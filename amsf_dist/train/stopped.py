"""How a job that was asked to stop leaves: it has saved, and is not done.

Exit code 0 means done to whoever started the processes, so the first process of a machine writes
into a file how far it is, and the launcher there looks.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

__all__ = ["PROGRESS_FILE", "REJOIN", "STOP_CODE", "exit_code", "listening", "progress", "tell"]

PROGRESS_FILE = "AMSF_PROGRESS_FILE"
"""Environment variable with the name of that file; `listening` sets it."""
STOP_CODE = "AMSF_STOP_CODE"
"""Environment variable with the exit code of `amsf train` for a job that stopped and saved; 0."""
REJOIN = 75
"""A worker's exit code when another node made it stop: its own goes on with those that remain."""

Progress = Literal["nothing", "training", "stopped"]
"""Nothing yet that could be lost; steps are being done; asked to stop, and everything is saved."""


@contextmanager
def listening() -> Iterator[Path]:
    """Have the processes that are started here `tell`.

    Yields:
        A folder that lasts as long.
    """
    before = os.environ.get(PROGRESS_FILE)
    with tempfile.TemporaryDirectory(prefix="amsf-") as directory:
        os.environ[PROGRESS_FILE] = str(Path(directory) / "progress")
        try:
            yield Path(directory)
        finally:
            # a job that this process runs later would tell a file that is gone
            del os.environ[PROGRESS_FILE]
            if before is not None:
                os.environ[PROGRESS_FILE] = before


def tell(progress: Progress) -> None:
    """Write down how far this machine's processes are."""
    name = os.environ.get(PROGRESS_FILE)
    if name and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(name).write_text(progress)


def progress() -> str:
    """Return what the first process of this machine has told last."""
    name = os.environ.get(PROGRESS_FILE)
    try:
        return Path(name).read_text() if name else "nothing"
    except FileNotFoundError:
        return "nothing"


def exit_code(asked_here: bool, launched: bool) -> int:
    """Return the exit code of a process that stopped and saved.

    Args:
        asked_here: this machine's processes were told to stop, not only those of another one.
        launched: by `launch`, which decides for its workers.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and not launched:
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        # With 0 the agent would take the job for done, and leave those that go on.
        return REJOIN if restarts and not asked_here else 0
    return 0 if "RANK" in os.environ else int(os.environ.get(STOP_CODE, 0))
