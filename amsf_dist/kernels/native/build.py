"""The compiled library: from a cache, or compiled there once, whichever rank comes first.

Plain C++ without torch's headers, which would take a minute; two or three seconds. OpenMP's
functions are those of the runtime that torch has loaded: a second pool of threads would fight
with the first one for the cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from amsf_dist.kernels.native.table import PIECE, TILE

__all__ = ["CACHE", "NoKernel", "library"]

logger = logging.getLogger(__name__)

CACHE = "AMSF_CACHE_DIR"
"""Environment variable: where compiled kernels are kept, instead of the user's cache directory."""

_FOLDER = Path(__file__).parent
_MAIN = "step.cpp"
# Contraction off: a multiply-add rounds once where it is used and twice elsewhere, and which of the
# two an element gets would depend on where it lies. Errno and traps only keep sqrt from vectors.
_FLAGS = (
    "-std=c++17 -O3 -march=native -ffp-contract=off -fno-math-errno -fno-trapping-math "
    "-fPIC -fopenmp"
).split()
_LINKS: tuple[tuple[str, ...], ...] = ((), ("-fopenmp",))  # torch's OpenMP; the compiler's own
_SECONDS = 120.0


class NoKernel(RuntimeError):
    """Why there is no compiled kernel here; steps are torch operations then."""


@cache
def library() -> ctypes.CDLL | None:
    """The library, compiled if need be; None, said once in the log, where that fails."""
    try:
        loaded, path = _library()
    except NoKernel as reason:
        logger.warning(
            "no compiled CPU kernel: %s; steps are torch operations, several times slower. "
            "AMSF_KERNEL=reference says that this is meant",
            reason,
        )
        return None
    logger.info("CPU kernel: %s, %d threads at most", path, loaded.amsf_threads())
    return loaded


def _library() -> tuple[ctypes.CDLL, Path]:
    compiler, folder = _compiler(), _folder()
    reason = ""
    for link in _LINKS:
        path = folder / f"step-{_fingerprint(compiler, link)}.so"
        if not path.exists():
            with _alone(path.with_suffix(".lock")):
                if not path.exists():
                    _compile(compiler, link, path)
        try:
            return _loaded(path), path
        except OSError as error:
            reason = str(error)
    raise NoKernel(reason)


def _compiler() -> str:
    named = os.environ.get("CXX", "").split()
    for name in [named[0]] if named else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise NoKernel(f"CXX={named[0]} is not there" if named else "no C++ compiler (g++) in PATH")


def _folder() -> Path:
    """A folder that is this user's own: what lies there is run."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    chosen = os.environ.get(CACHE)
    user = os.getuid() if hasattr(os, "getuid") else 0
    beside = Path(tempfile.gettempdir()) / f"amsf_dist-{user}"
    for folder in [Path(chosen)] if chosen else [Path(home) / "amsf_dist", beside]:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid == user and os.access(folder, os.W_OK | os.X_OK):
                return folder
        except OSError:
            continue
    raise NoKernel(f"no folder to compile in; set {CACHE} to one that is writable and yours")


def _fingerprint(compiler: str, link: Sequence[str]) -> str:
    """Of all that decides the library's code: sources, flags, compiler and processor."""
    digest = hashlib.sha256()
    for path in sorted([*_FOLDER.glob("*.h"), _FOLDER / _MAIN]):
        digest.update(path.read_bytes())
    where = os.path.realpath(compiler)
    facts = [*_FLAGS, *link, where, str(os.stat(where).st_mtime_ns), platform.platform(), _cpu()]
    digest.update("\n".join(facts).encode())
    return digest.hexdigest()[:20]


def _cpu() -> str:
    """What `-march=native` looks at: homes are shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    words = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(words)}))


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Keep other processes out; the kernel lets go of it for a process that is killed."""
    try:
        import fcntl
    except ImportError as error:
        raise NoKernel("this system has no flock") from error
    deadline = time.monotonic() + 2 * _SECONDS
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise NoKernel(f"another process holds {lock} for minutes") from error
                time.sleep(0.05)
        yield


def _compile(compiler: str, link: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        half, whole = Path(scratch) / "step.o", Path(scratch) / "step.so"
        for command in (
            [compiler, *_FLAGS, *_wide(), "-c", str(_FOLDER / _MAIN), "-o", str(half)],
            [compiler, "-shared", str(half), *link, "-o", str(whole)],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise NoKernel(f"{compiler}: {error}") from error
            if done.returncode:
                said = next((line for line in done.stderr.splitlines() if "error" in line), "")
                raise NoKernel(f"{compiler} failed: {said or done.stderr[-200:].strip()}")
        os.replace(whole, path)


def _wide() -> list[str]:
    """Vectors of 512 bits where there are any; compilers prefer 256 by themselves."""
    return ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []


def _loaded(path: Path) -> ctypes.CDLL:
    """Raise OSError where it does not load, or is not what this package expects."""
    loaded = ctypes.CDLL(str(path))
    for name in ("amsf_tile_bytes", "amsf_piece_bytes", "amsf_threads"):
        getattr(loaded, name).restype = ctypes.c_int64
    sizes = loaded.amsf_tile_bytes(), loaded.amsf_piece_bytes()
    if sizes != (TILE.itemsize, PIECE.itemsize):
        raise OSError(f"{path}: structs of {sizes} bytes")
    if not loaded.amsf_threads():
        raise OSError(f"{path}: without OpenMP")
    for name in ("amsf_measure", "amsf_move", "amsf_step"):
        function = getattr(loaded, name)
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        function.restype = ctypes.c_int64
    return loaded
