"""A request to stop: SIGTERM, Ctrl-C, a closed terminal, a launcher that is gone.

All mean: save and leave. A signal only sets a flag. The processes agree on it at the end of a step
(`loop`), so that all of them save the same step, and none is left waiting for another.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

__all__ = ["STOP_FILE", "StopRequest"]

# Environment variable with the name of the file that the launcher makes when it is told to stop.
STOP_FILE = "AMSF_STOP_FILE"


class StopRequest:
    """Knows whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        """Take over the signals; the launcher's file is looked for where the environment says."""
        name = os.environ.get(STOP_FILE)
        self._file = Path(name) if name else None
        self._launcher = os.getppid() if self._file else None
        self._signal: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # nohup has SIGHUP ignored, and means it.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._take)

    def reason(self) -> str | None:
        """Return what asked this process to stop, or None."""
        if self._signal:
            return self._signal
        if self._file is None:
            return None
        try:
            return self._file.read_text()
        except FileNotFoundError:
            return None if os.getppid() == self._launcher else "the end of the launcher"

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # a second Ctrl-C does not wait
