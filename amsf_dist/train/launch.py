"""Start the processes of a job with torch's own elastic launcher, and ask them to stop.

The launcher answers a signal by killing its workers. Ours must save first, so SIGTERM and SIGINT
stay with this process: it makes a file that the workers look for after every step, and waits. They
finish the step, save, and exit 0, which the launcher takes for success.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from amsf_dist.train.signals import STOP_FILE
from amsf_dist.train.stopped import STOP_CODE, listening, progress

__all__ = ["is_worker", "launch", "tell_of_failure"]


def is_worker() -> bool:
    """Return True in a process that torchrun, `launch` or a scheduler started as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: list[str], nproc: int, device: str) -> int:
    """Run `python -m amsf_dist <arguments>` in `nproc` processes and return their exit code.

    Args:
        arguments: of the command line, for every process.
        nproc: number of processes.
        device: `cpu` or `cuda`; on a CPU the cores are shared out.
    """
    if device == "cpu":
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    _silence_launcher()
    with listening() as directory:
        stop_file = directory / "stop"
        os.environ[STOP_FILE] = str(stop_file)
        _pass_on_signals(stop_file)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a free port
            local_addr="localhost",
            max_restarts=0,
            signals_to_handle="SIGQUIT",
            logs_specs=DefaultLogsSpecs(log_dir=str(directory)),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "amsf_dist", *arguments)
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            return tell_of_failure(failure.exitcode)
        except (SignalException, KeyboardInterrupt):
            sys.stderr.write("amsf: stopped at once; the last checkpoint is still good\n")
            return 130
        return int(os.environ.get(STOP_CODE, 0)) if progress() == "stopped" else 0


def tell_of_failure(exitcode: int) -> int:
    """Say what ended a worker, unless it has said so itself, and return the launcher's exit code.

    Args:
        exitcode: of the worker; negative: the signal that killed it.
    """
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        sys.stderr.write(
            f"amsf: a worker was killed by {name} (out of memory?); "
            "run the same command again to continue from the last checkpoint\n"
        )
    return exitcode if exitcode > 0 else 1


def _silence_launcher() -> None:
    """Keep the launcher from telling of a worker that fails: the worker itself has said why."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _pass_on_signals(stop_file: Path) -> None:
    def take(number: int, frame: FrameType | None) -> None:
        partial = stop_file.with_suffix(".tmp")
        partial.write_text(signal.Signals(number).name)
        os.replace(partial, stop_file)  # no worker sees half a word
        if number == signal.SIGINT:
            signal.signal(number, _leave_at_once)
            if sys.stderr.isatty():
                sys.stderr.write("\namsf: saving after this step; Ctrl-C again to leave at once\n")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, take)


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    # What torch's own handler raises: the launcher then ends the workers before it returns.
    raise SignalException("second Ctrl-C", sigval=signal.SIGKILL)
