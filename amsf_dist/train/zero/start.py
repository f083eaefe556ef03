"""DeepSpeed brought up: imported, its CPU collective compiled, its configuration accepted."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amsf_dist.train.config import Config
from amsf_dist.train.errors import UserError, one_line
from amsf_dist.train.parallel import World
from amsf_dist.train.zero.config import deepspeed_config

__all__ = ["build_cpu_collective", "quietly", "refused", "start_deepspeed", "wait_for_lock"]

logger = logging.getLogger(__name__)

STALE_SECONDS = 600.0  # the compiler is done in one or two minutes


def start_deepspeed(config: Config, world: World) -> None:
    """Import DeepSpeed into the group that has been joined; every process must call it.

    Args:
        config: the job, under `parallel: deepspeed`.
        world: this process among the others.

    Raises:
        UserError: if the CPU collective cannot be compiled, or DeepSpeed refuses its file.
    """
    os.environ.setdefault("LOCAL_RANK", "0")
    # It calls torch by names that are on their way out.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    with world.together(), quietly():
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    first_here = os.environ["LOCAL_RANK"] == "0"
    # One process of a machine compiles; the others find what it made.
    for turn in (True, False):
        with world.together():
            if turn == first_here:
                build_cpu_collective()
    with world.together(), quietly(), refused(config):
        deepspeed.init_distributed(dist_backend=_backend())
        deepspeed.DeepSpeedConfig(deepspeed_config(config, world.size))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep from the terminal what DeepSpeed prints on every process."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def refused(config: Config) -> Iterator[None]:
    """Turn what DeepSpeed raises over its configuration into one line.

    It has no error of its own for this: assertions, KeyError and pydantic's come up alike.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"deepspeed: {config.deepspeed}: DeepSpeed refuses it: "
            f"{type(error).__name__}: {one_line(error, 400)}"
        ) from error


def wait_for_lock(lock: Path, stale_seconds: float = STALE_SECONDS) -> None:
    """Wait while another process compiles, but not for one that has been killed.

    torch keeps others out by a file, which a killed process leaves behind, and waits for it to go
    away without a word, for ever.

    Args:
        lock: the file.
        stale_seconds: age at which nobody can be compiling any more.

    Raises:
        UserError: if it has got that old.
    """
    told = False
    while True:
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return
        if age > stale_seconds:
            raise UserError(
                f"{lock}: a process that compiled DeepSpeed's collective was killed and left this "
                "lock; delete it and run again"
            )
        if not told:
            logger.info("waiting for the process that holds %s; if none does, delete it", lock)
            told = True
        time.sleep(0.2)


def build_cpu_collective() -> None:
    """Load the shared-memory collective that DeepSpeed uses between CPU processes.

    Compiled on its first use by a user, and loaded from a folder of torch's from then on.

    Raises:
        UserError: if it cannot be compiled, or a process that was killed has left its lock there.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder: Any = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    from torch.utils.cpp_extension import _get_build_directory

    # A virtual environment that is not activated has its ninja beside its python.
    if shutil.which("ninja") is None:
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    folder = Path(_get_build_directory(builder.name, verbose=False))
    wait_for_lock(folder / "lock")
    if not any(folder.glob("*.so")):
        logger.info("compiling DeepSpeed's CPU collective in %s, a minute, once", folder)
    try:
        with quietly():
            builder.load(verbose=False)
    except Exception as error:
        raise UserError(
            "parallel=deepspeed: DeepSpeed compiles a collective for CPUs and could not: "
            f"{one_line(error, 300)}; install a C++ compiler (g++) and ninja, or use parallel=fsdp2"
        ) from error


def _backend() -> str:
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().communication_backend_name())
