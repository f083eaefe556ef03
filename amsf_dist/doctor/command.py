"""`amsf doctor`: a title, a line as soon as there is an answer, then what to know besides."""

from __future__ import annotations

import json
import signal
import sys

from amsf_dist.doctor import examine
from amsf_dist.doctor.report import Finding, ending, row

__all__ = ["doctor"]


def doctor(config: str | None, nproc: int, timeout: float, as_json: bool) -> int:
    """Examine, print, and return the exit code.

    Args:
        config: a file, or None.
        nproc: number of processes.
        timeout: seconds that one collective may take, and three times that one check.
        as_json: print one object at the end, and nothing before.

    Returns:
        0 if no check failed, else 1.
    """

    def start(title: str) -> None:
        if not as_json:
            sys.stdout.write(f"{title}\n\n")
            sys.stdout.flush()

    def tell(finding: Finding) -> None:
        if not as_json:
            sys.stdout.write("\n".join(row(finding)) + "\n")
            sys.stdout.flush()

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and tidy up
    report = examine(config, nproc=nproc, timeout=timeout, starts=start, tells=tell)
    if as_json:
        sys.stdout.write(json.dumps(report.as_dict(), indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(ending(report)) + "\n")
    return 0 if report.healthy else 1
