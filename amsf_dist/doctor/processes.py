"""Start the processes of an examination, listen to them, and end them when they are stuck."""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

from amsf_dist.doctor.checks import Examination
from amsf_dist.doctor.report import CHECKS, FAILED, NOT_APPLICABLE, WRAPPER, Finding
from amsf_dist.doctor.setup import Setup
from amsf_dist.doctor.wrap import environment
from amsf_dist.doctor.wrapped import Factory

__all__ = ["examine_here", "in_processes"]

# DeepSpeed compiles operators when they are first used; what takes longer was killed meanwhile
_COMPILING_SECONDS = 600.0
_STARTING_SECONDS = 300.0  # importing everything, on a machine that is busy
_LOG_LINES = 8

Told = tuple[tuple[Finding, ...], str]
"""Findings, and the end of a log."""


def examine_here(
    setup: Setup,
    factory: Factory,
    folder: Path,
    device: torch.device | None = None,
    starts: Callable[[str], None] = lambda check: None,
    tells: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """Examine in the present process group; every rank must call it.

    Args:
        setup: which wrapper.
        factory: of the optimizer.
        folder: the same for all ranks, and there; what is left in it is the caller's.
        device: of this process; the CPU by default.
        starts: called with a check before it begins.
        tells: called with the answer to a check.

    Returns:
        One finding per check, the same on every rank.
    """
    device = device or torch.device("cpu")
    with environment(setup, device):
        return Examination(setup, factory, folder, device, starts, tells).run()


def in_processes(
    setup: Setup,
    factory: Factory,
    nproc: int,
    device_type: str,
    timeout: float,
    tells: Callable[[Finding], None],
) -> Told:
    """Examine in new processes; nothing of them is left when it returns.

    Args:
        setup: which wrapper.
        factory: of the optimizer; importable by name.
        nproc: number of processes.
        device_type: "cpu" or "cuda".
        timeout: seconds that one collective may take, and three times that one check; not counted
            while DeepSpeed compiles.
        tells: called with every answer as it comes.
    """
    context = multiprocessing.get_context("spawn")
    folder = Path(tempfile.mkdtemp(prefix="amsf-doctor-"))
    began = time.time()
    processes: list[BaseProcess] = []
    try:
        for rank in range(nproc):
            args = (folder, rank, nproc, setup, factory, device_type, timeout)
            processes.append(context.Process(target=_work, args=args, daemon=True))
            processes[-1].start()
        return _listen(folder, processes, timeout, tells)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        _remove_locks(began)
        shutil.rmtree(folder, ignore_errors=True)


def _listen(
    folder: Path, processes: list[BaseProcess], timeout: float, tells: Callable[[Finding], None]
) -> Told:
    """Read what the processes write until they are done, dead, or stuck."""
    told: list[Finding] = []
    began, check = time.monotonic(), ""
    while True:
        ended = all(process.exitcode is not None for process in processes)
        dead = [rank for rank, process in enumerate(processes) if process.exitcode]
        for line in _lines(folder / "findings")[len(told) :]:
            finding = Finding(**json.loads(line))
            told.append(replace(finding, notes=tuple(finding.notes)))
            tells(told[-1])
        if len(told) == len(CHECKS):
            return tuple(told), ""
        now = (_lines(folder / "checks") or [""])[-1]
        building = CHECKS[len(told)] == WRAPPER
        if now != check or (building and any(_age(lock) < _COMPILING_SECONDS for lock in _locks())):
            began, check = time.monotonic(), now
        # the group's own timeout comes first, twice: in the check, and in agreeing on it
        allowed = 3.0 * timeout if now else _STARTING_SECONDS
        if dead or ended:
            dead = dead or [0]
            rank = min(dead, key=lambda rank: processes[rank].exitcode or 0)
            trouble = f"process {rank} {_end_of(processes[rank])}"
            for process in processes:  # the others miss it, and say so
                process.join(timeout)
            break
        if time.monotonic() - began > allowed:
            trouble = f"nothing happened for {allowed:.0f} s: the processes wait for each other"
            locks = _locks() if building else []
            trouble += "".join(f", or for {lock}; remove it" for lock in locks[:1])
            _show_stacks(processes)
            break
        time.sleep(0.1)
    last = [Finding(CHECKS[len(told)], FAILED, trouble)]
    last += [Finding(name, NOT_APPLICABLE, "not reached") for name in CHECKS[len(told) + 1 :]]
    for finding in last:
        tells(finding)
    logs = [_end_of_log(folder / f"log{rank}") for rank in range(len(processes))]
    log = [f"process {rank} said last:\n{text}" for rank, text in enumerate(logs) if text]
    return (*told, *last), "\n\n".join(log)


def _show_stacks(processes: list[BaseProcess]) -> None:
    """Let processes that are stuck write into their logs where they are; this ends them."""
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGABRT)
    for process in processes:
        process.join(2.0)


def _end_of_log(path: Path) -> str:
    """What a process said last: from the place where it was killed, if it was."""
    lines = [line for line in _lines(path) if line.strip()]
    fatal = [number for number, line in enumerate(lines) if line.startswith("Fatal Python error")]
    return "\n".join(lines[fatal[-1] :][:_LOG_LINES] if fatal else lines[-_LOG_LINES:])


def _lines(path: Path) -> list[str]:
    """Complete lines of a file that is being written."""
    if not path.exists():
        return []
    text = path.read_text(errors="replace")
    return text[: text.rfind("\n") + 1].splitlines()


def _end_of(process: BaseProcess) -> str:
    code = process.exitcode or 0
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _work(
    folder: Path,
    rank: int,
    nproc: int,
    setup: Setup,
    factory: Factory,
    device_type: str,
    timeout: float,
) -> None:
    """One process: everything that libraries say goes into its log."""
    log = os.open(folder / f"log{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    code = 0
    try:
        device = _device(device_type, rank, nproc)
        for name in ("torch._dynamo", *setup.libraries):  # the first optimizer imports the former
            importlib.import_module(name)
        path = str(folder / "rendezvous")
        store = dist.FileStore(path, nproc)  # type: ignore[attr-defined]
        store.set(f"ready{rank}", "yes")
        everyone = [f"ready{other}" for other in range(nproc)]
        store.wait(everyone, timedelta(seconds=_STARTING_SECONDS))
        dist.init_process_group(
            _backend(setup, device_type),
            store=store,
            rank=rank,
            world_size=nproc,
            timeout=timedelta(seconds=timeout),
        )
        saved = folder / "checkpoint"
        saved.mkdir(exist_ok=True)

        def write(name: str, line: str) -> None:
            if rank == 0:
                with (folder / name).open("a") as file:
                    file.write(line + "\n")

        examine_here(
            setup,
            factory,
            saved,
            device,
            starts=lambda check: write("checks", check),
            tells=lambda finding: write("findings", json.dumps(asdict(finding))),
        )
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of gloo must not outlive the group they wait for


def _device(device_type: str, rank: int, nproc: int) -> torch.device:
    if device_type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no library shall choose another device
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // nproc))
        return torch.device("cpu")
    # a resumed step is compared bit for bit
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _backend(setup: Setup, device_type: str) -> str:
    """As the library would choose: a group that has more would hide what fails without it."""
    if device_type == "cpu":
        return "gloo"
    both = setup.environment.get("FSDP_OFFLOAD_PARAMS") == "true"
    both |= setup.environment.get("FSDP_STATE_DICT_TYPE") == "FULL_STATE_DICT"
    return "cpu:gloo,cuda:nccl" if setup.shards and both else "nccl"


def _locks() -> list[Path]:
    """Marks of operators that are being compiled, or whose compilation was killed."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return [*root.glob("*/lock"), *root.glob("*/*/lock")]


def _age(path: Path) -> float:
    """Seconds since a file was written; none if it has just been removed."""
    return time.time() - path.stat().st_mtime if path.exists() else 0.0


def _remove_locks(began: float) -> None:
    """Remove the marks of a compilation that was killed with our processes; they hang later ones.

    Args:
        began: when ours were started; older marks are not ours.
    """
    for lock in _locks():
        if _age(lock) <= time.time() - began:
            lock.unlink(missing_ok=True)
