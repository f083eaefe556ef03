"""launch/accelerate.sh: the command that it runs, and what it refuses."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from launched import ROOT, start

ACCELERATE = {
    "": "--num_machines 1 --main_process_port 29500",
    "NPROC_PER_NODE=2 DEVICE=cpu": "--num_processes 2 --num_machines 1 --main_process_port 29500",
    "NNODES=2 NPROC_PER_NODE=8 NODE_RANK=1 MASTER_ADDR=10.0.0.1 MASTER_PORT=3": (
        "--num_processes 16 --num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 "
        "--main_process_port 3"
    ),
}


@pytest.mark.parametrize("settings", ACCELERATE)
def test_accelerate_is_given_a_file_and_a_script(settings: str) -> None:
    config = str(ROOT / "configs/accelerate/ddp.yaml")
    code, out, err = start(
        "accelerate.sh", "--dry-run", config, "train.py", "a b", settings=settings
    )
    assert code == 0 and err == ""
    on_cpu = ["env", "ACCELERATE_USE_CPU=true"] if "cpu" in settings else []
    words = ["+", *on_cpu, "py", "-m", "accelerate.commands.launch", "--config_file", config]
    assert shlex.split(out) == [*words, *ACCELERATE[settings].split(), "train.py", "a b"]


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
    code, out, err = start("accelerate.sh", "--dry-run", str(config), "train.py", settings=settings)
    assert code == 2 and out == ""
    assert err.startswith("launch/accelerate.sh: ") and says in err


@pytest.mark.parametrize("words", [[], ["--dry-run"], ["file.yaml"], ["--fast", "a", "b"]])
def test_accelerate_without_a_script_says_how_it_is_used(words: list[str]) -> None:
    code, out, err = start("accelerate.sh", *words)
    assert code == 2 and err.startswith("usage: launch/accelerate.sh [--dry-run]")


def test_accelerate_without_a_gpu_must_be_told_so() -> None:
    """There is no `py`: nothing says that there is a GPU, and nothing is started."""
    code, out, err = start("accelerate.sh", str(ROOT / "configs/accelerate/ddp.yaml"), "train.py")
    assert code == 2 and out == ""
    assert "every process would train alone; DEVICE=cpu" in err
