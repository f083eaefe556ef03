"""How a job that was asked to stop leaves: it has saved, and is not done.

Exit code 0 means done to whoever started the processes, so the first process of a machine notes in
a file that it stopped, and the launcher there looks for it.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["REJOIN", "STOPPED_FILE", "STOP_CODE", "exit_code", "note", "start_anew", "was_stopped"]

STOPPED_FILE = "AMSF_STOPPED_FILE"
STOP_CODE = "AMSF_STOP_CODE"
"""Environment variable with the exit code of `amsf train` for a job that stopped and saved; 0."""
REJOIN = 75
"""A worker's exit code when another node made it stop: its own goes on with those that remain."""


def start_anew() -> None:
    """Forget that the processes before these were stopped."""
    file = _file()
    if file is not None:
        file.unlink(missing_ok=True)


def note() -> None:
    """Write down that this machine's processes stopped, and that everything is saved."""
    file = _file()
    if file is not None:
        file.touch()


def was_stopped() -> bool:
    """Return whether this machine's processes stopped before they were done."""
    name = os.environ.get(STOPPED_FILE)
    return name is not None and Path(name).exists()


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


def _file() -> Path | None:
    name = os.environ.get(STOPPED_FILE)
    return Path(name) if name and os.environ.get("LOCAL_RANK", "0") == "0" else None
