"""torchrun in plain words: `python -m amsf_dist.train.elastic` takes torchrun's arguments.

Differences: what can be seen beforehand is said beforehand; a rendezvous that fails is one line,
not a traceback; a job that was told to stop and saved ends with 143, where torchrun says 1.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousTimeoutError,
)
from torch.distributed.run import parse_args, parse_min_max_nnodes, run

from amsf_dist.train.config_file import load_config
from amsf_dist.train.errors import UserError, one_line
from amsf_dist.train.launch import tell_of_failure
from amsf_dist.train.machine import free_port
from amsf_dist.train.preflight import check_output
from amsf_dist.train.stopped import listening, progress
from amsf_dist.train.text import check_source

__all__ = ["STOPPED", "main"]

STOPPED = 143
"""Exit code: told to stop, and nothing is lost. As shells say of SIGTERM."""


def main(words: Sequence[str]) -> int:
    """Run torchrun and return the exit code.

    Args:
        words: torchrun's arguments: `--nnodes 1:2 ... -m amsf_dist train CONFIG`.
    """
    arguments = parse_args(list(words))
    with listening():
        signal.signal(signal.SIGTERM, _stop)  # torch takes over once there are workers
        try:
            check(arguments)
            run(arguments)
        except UserError as error:
            return _say(str(error), 2)
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            return STOPPED if progress() == "stopped" else tell_of_failure(failure.exitcode)
        except SignalException as error:
            if progress() != "training":
                return STOPPED
            return _say(
                f"stopped by {error.sigval.name}, and no checkpoint of the last steps could be "
                "written in time; raise TORCH_ELASTIC_SHUTDOWN_TIMEOUT (seconds)",
                1,
            )
        except (RendezvousError, DistError) as error:
            return _say(explain(error, arguments), STOPPED if progress() == "stopped" else 1)
        # Workers that another node made stop end with 0, like those that are done.
        return STOPPED if progress() == "stopped" else 0


def check(arguments: Any) -> None:
    """Look at what can be seen before the other nodes are there.

    Args:
        arguments: torchrun's, parsed.

    Raises:
        UserError: the config is wrong, its text is not there, its output cannot be written, the
            port is taken, or a number of nodes that may come makes a number of processes that the
            batch, or the model, cannot be shared out to.
    """
    processes = _processes_here(arguments)
    if arguments.training_script == "amsf_dist" and len(arguments.training_script_args) > 1:
        task, path, *overrides = arguments.training_script_args
        config = load_config(path, overrides)
        if task == "train":  # every node needs these; workers would be started again and again
            check_output(config)
            check_source(config.data)
        smallest, largest = parse_min_max_nnodes(arguments.nnodes)
        for nodes in range(smallest, largest + 1):
            try:
                config.micro_batches(nodes * processes)
                config.shards(nodes * processes)
            except ValueError as error:
                told = f"{nodes} node{'s' if nodes > 1 else ''} of {processes} processes: {error}"
                raise UserError(told if largest > 1 else str(error)) from None
    _, _, port = arguments.rdzv_endpoint.rpartition(":")
    if "is_host=1" in arguments.rdzv_conf.split(",") and port.isdigit():
        found = free_port(int(port))
        if found.level == "failure":
            raise UserError(found.text)


def explain(error: Exception, arguments: Any) -> str:
    """Return one line on a rendezvous that failed: what happened, and the way out."""
    where = arguments.rdzv_endpoint or "the rendezvous"
    if isinstance(error, RendezvousTimeoutError):
        smallest, _ = parse_min_max_nnodes(arguments.nnodes)
        return (
            f"rendezvous: fewer than {smallest} nodes came to {where} in time; start the others, "
            "with the same JOB_ID, NNODES and MASTER_ADDR, or raise RDZV_TIMEOUT (seconds)"
        )
    if isinstance(error, RendezvousClosedError):
        return f"rendezvous: the job at {where} has ended; start it again on every node"
    if isinstance(error, RendezvousConnectionError | DistError):
        return (
            f"rendezvous: no connection to {where}; see that node 0 (NODE_RANK=0) runs there, that "
            "the port is open to this machine, and start node 0 again if it is gone"
        )
    return f"rendezvous at {where}: {one_line(error, 300)}"


def _processes_here(arguments: Any) -> int:
    given = arguments.nproc_per_node
    if given.isdigit():
        return int(given)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if given == "gpu" and not count:
        raise UserError(
            "NPROC_PER_NODE is gpu, one process per GPU, and torch sees none here; "
            "set NPROC_PER_NODE=2 for two processes on CPUs"
        )
    return count or os.cpu_count() or 1


def _stop(number: int, frame: FrameType | None) -> None:
    raise SignalException("told to stop", sigval=signal.Signals(number))


def _say(text: str, code: int) -> int:
    sys.stderr.write(f"amsf: {text}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
