"""launch/*.sh: the command that each of them runs, word by word."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
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
ACCELERATE = {
    "": "--num_machines 1 --main_process_port 29500",
    "NPROC_PER_NODE=2 DEVICE=cpu": "--num_processes 2 --num_machines 1 --main_process_port 29500",
    "NNODES=2 NPROC_PER_NODE=8 NODE_RANK=1 MASTER_ADDR=10.0.0.1 MASTER_PORT=3": (
        "--num_processes 16 --num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 "
        "--main_process_port 3"
    ),
}
NAMES = (
    "DEVICE",
    "MASTER_PORT",
    "NPROC_PER_NODE",
    "NNODES",
    "NODE_RANK",
    "MASTER_ADDR",
    "LOCAL_ADDR",
    "HOSTFILE",
)


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


@pytest.mark.parametrize("settings", ACCELERATE)
def test_accelerate_is_given_a_file_and_a_script(settings: str) -> None:
    config = str(ROOT / "configs/accelerate/ddp.yaml")
    done = start("accelerate.sh", "--dry-run", config, "train.py", "a b", settings=settings)
    assert done.returncode == 0 and done.stderr == ""
    on_cpu = ["env", "ACCELERATE_USE_CPU=true"] if "cpu" in settings else []
    words = ["+", *on_cpu, "py", "-m", "accelerate.commands.launch", "--config_file", config]
    assert shlex.split(done.stdout) == [*words, *ACCELERATE[settings].split(), "train.py", "a b"]


@pytest.mark.parametrize(
    ("content", "settings", "says"),
    [
        ("use_cpu: true", "DEVICE=cpu", "single process"),
        ("distributed_type: 'MULTI_CPU'", "", "single process"),
        ("distributed_type: FSDP", "DEVICE=cpu", "leaves FSDP and DeepSpeed out"),
        ("distributed_type: DEEPSPEED", "DEVICE=cpu", "leaves FSDP and DeepSpeed out"),
        ("distributed_type: FSDP", "DEVICE=tpu", "neither gpu nor cpu"),
        ("distributed_type: MULTI_GPU", "NNODES=2", "needs MASTER_ADDR"),
        ("distributed_type: MULTI_GPU", "NNODES=2 MASTER_ADDR=a", "needs NPROC_PER_NODE"),
        (None, "", "no such file"),
    ],
)
def test_what_accelerate_does_in_silence_is_refused(
    tmp_path: Path, content: str | None, settings: str, says: str
) -> None:
    config = tmp_path / "file.yaml"
    if content is not None:
        config.write_text(f"compute_environment: LOCAL_MACHINE\n{content}\n")
    done = start("accelerate.sh", "--dry-run", str(config), "train.py", settings=settings)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("launch/accelerate.sh: ") and says in done.stderr


@pytest.mark.parametrize("words", [[], ["--dry-run"], ["file.yaml"], ["--fast", "a", "b"]])
def test_accelerate_without_a_script_says_how_it_is_used(words: list[str]) -> None:
    done = start("accelerate.sh", *words)
    assert done.returncode == 2 and done.stderr.startswith(
        "usage: launch/accelerate.sh [--dry-run]"
    )


def test_accelerate_without_a_gpu_must_be_told_so() -> None:
    """There is no `py`: nothing says that there is a GPU, and nothing is started."""
    done = start("accelerate.sh", str(ROOT / "configs/accelerate/ddp.yaml"), "train.py")
    assert done.returncode == 2 and done.stdout == ""
    assert "every process would train alone; DEVICE=cpu" in done.stderr


def test_several_nodes_need_an_address() -> None:
    done = start("torchrun.sh", "job.yaml", settings="NNODES=2")
    assert done.returncode == 2 and "NNODES=2 needs MASTER_ADDR" in done.stderr
