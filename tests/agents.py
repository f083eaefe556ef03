"""torchrun agents as the nodes of a cluster: started by launch/torchrun.sh, killed, looked at."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

SCRIPT = Path(__file__).parents[1] / "launch" / "torchrun.sh"


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Node:
    """One agent and its workers; what they say goes to a file."""

    def __init__(self, log: Path, *words: object, **settings: object) -> None:
        """Start `launch/torchrun.sh` with these variables."""
        inherited = {
            key: value
            for key, value in os.environ.items()
            if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        }
        ours = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        ours |= {"LOCAL_ADDR": "127.0.0.1", "MASTER_ADDR": "127.0.0.1", "NPROC_PER_NODE": "1"}
        given = {key: str(value) for key, value in settings.items()}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [str(SCRIPT), *map(str, words)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**inherited, **ours, **given},
                start_new_session=True,
            )

    def says(self) -> str:
        """All that it has said so far."""
        return self.log.read_text()

    def kill(self) -> None:
        """End it as a machine that loses its power: agent and workers, without a word."""
        try:
            family = psutil.Process(self.process.pid)
            for member in [family, *family.children(recursive=True)]:
                member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass
        self.process.wait()

    def stop(self) -> None:
        """Ask it to stop, as schedulers do."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = 120) -> int:
        """Wait for its end and return the exit code."""
        return self.process.wait(timeout=seconds)


def until(what: str, condition: Callable[[], bool], *nodes: Node, seconds: float = 120) -> None:
    """Wait for a condition; fail if a node ends, or time does."""
    deadline = time.monotonic() + seconds
    while not condition():
        for node in nodes:
            assert node.process.poll() is None, f"{what}: a node has ended\n{node.says()}"
        assert time.monotonic() < deadline, f"{what}\n" + "\n---\n".join(n.says() for n in nodes)
        time.sleep(0.05)
