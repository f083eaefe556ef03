"""launch/*.sh: the command that each of them runs, word by word."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
RENDEZVOUS = "--rdzv-id amsf --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29500"
WORKERS = "-m amsf_dist train job.yaml"
LOCAL = "--master_port 29500 --no_local_rank --module amsf_dist train job.yaml"
COMMANDS = {
    "torchrun.sh": ("", f"--nproc-per-node gpu --standalone --local-addr 127.0.0.1 {WORKERS}"),
    "torchrun.sh on two processes": (
        "NPROC_PER_NODE=2",
        f"--nproc-per-node 2 --standalone --local-addr 127.0.0.1 {WORKERS}",
    ),
    "torchrun.sh on the first node": (
        "NNODES=4 MASTER_ADDR=10.0.0.1",
        f"--nproc-per-node gpu --nnodes 4 {RENDEZVOUS} --rdzv-conf is_host=1 {WORKERS}",
    ),
    "torchrun.sh on the second": (
        "NNODES=4 MASTER_ADDR=10.0.0.1 NODE_RANK=1 LOCAL_ADDR=10.0.0.2",
        f"--nproc-per-node gpu --nnodes 4 {RENDEZVOUS} --rdzv-conf is_host=0 "
        f"--local-addr 10.0.0.2 {WORKERS}",
    ),
    "deepspeed.sh": ("", LOCAL),
    "deepspeed.sh on two processes": ("NPROC_PER_NODE=2", f"--num_gpus 2 {LOCAL}"),
    "deepspeed.sh with hosts": ("HOSTFILE=hosts", f"--hostfile hosts {LOCAL}"),
}
NAMES = ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "LOCAL_ADDR", "HOSTFILE")


def start(script: str, *words: str, settings: str = "") -> subprocess.CompletedProcess[str]:
    """Run a script with variables such as `NNODES=2` and no others of its own."""
    environment = {key: value for key, value in os.environ.items() if key not in NAMES}
    environment |= dict(pair.split("=") for pair in settings.split())
    return subprocess.run(
        [str(LAUNCH / script), *words],
        capture_output=True,
        text=True,
        env={**environment, "PYTHON": "py"},  # there is none: a dry run must not miss it
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_prints_the_command_and_runs_nothing(name: str) -> None:
    settings, expected = COMMANDS[name]
    script = name.partition(" ")[0]
    module = "torch.distributed.run" if script == "torchrun.sh" else "deepspeed.launcher.runner"
    done = start(script, "--dry-run", "job.yaml", "model.path=a b", settings=settings)
    assert done.returncode == 0 and done.stderr == ""
    words = ["+", "py", "-m", module, *expected.split(), "model.path=a b"]
    assert shlex.split(done.stdout) == words


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
@pytest.mark.parametrize("words", [[], ["--dry-run"], ["--fast", "job.yaml"]])
def test_a_script_without_a_config_says_how_it_is_used(script: str, words: list[str]) -> None:
    done = start(script, *words)
    assert done.returncode == 2 and done.stderr.startswith(f"usage: launch/{script} [--dry-run]")


def test_several_nodes_need_an_address() -> None:
    done = start("torchrun.sh", "job.yaml", settings="NNODES=2")
    assert done.returncode == 2 and "NNODES=2 needs MASTER_ADDR" in done.stderr
