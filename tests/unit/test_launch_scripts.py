"""launch/: the command that each script runs, word by word; linters on all that is not Python."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from launched import LAUNCH, ROOT, start

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *ROOT.glob("docker/*.sh")])

ELASTIC = "py -m amsf_dist.train.elastic"
ALONE = "--standalone --local-addr 127.0.0.1 --max-restarts 0 -m amsf_dist train job.yaml"
RENDEZVOUS = "--rdzv-id amsf --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29500 --rdzv-conf"
TIMES = "join_timeout=600,read_timeout=600"
FAST = "last_call_timeout=3,keep_alive_interval=2,keep_alive_max_attempt=2"
FIXED = "--max-restarts 0 -m amsf_dist train job.yaml"
LOCAL = "--master_port 29500 --no_local_rank --module amsf_dist train job.yaml"
DEEPSPEED = "py -m deepspeed.launcher.runner"
LIMITS = "--stop-timeout 300 --shm-size 16g --ulimit stack=67108864"
CLOSED = "--cap-drop ALL --security-opt no-new-privileges"
MOUNTS = "--volume HERE/runs:/workspace/runs --volume amsf-cache:/cache"
NODE = '\'NODE_RANK=$SLURM_NODEID LOCAL_ADDR=${LOCAL_ADDR:-$SLURMD_NODENAME} exec "$0" "$@"\''
COMMANDS = {
    "torchrun.sh": ("", f"{ELASTIC} --nproc-per-node gpu {ALONE}"),
    "torchrun.sh on two processes": ("NPROC_PER_NODE=2", f"{ELASTIC} --nproc-per-node 2 {ALONE}"),
    "torchrun.sh on the first node": (
        "NNODES=4 MASTER_ADDR=10.0.0.1",
        f"{ELASTIC} --nproc-per-node gpu --nnodes 4 {RENDEZVOUS} is_host=1,{TIMES} {FIXED}",
    ),
    "torchrun.sh on the second": (
        "NNODES=4 MASTER_ADDR=10.0.0.1 NODE_RANK=1 LOCAL_ADDR=10.0.0.2 RDZV_TIMEOUT=60",
        f"{ELASTIC} --nproc-per-node gpu --nnodes 4 {RENDEZVOUS} "
        f"is_host=0,join_timeout=60,read_timeout=60 --local-addr 10.0.0.2 {FIXED}",
    ),
    "torchrun.sh elastic": (
        "NNODES=1:4 MASTER_ADDR=10.0.0.1 JOB_ID=amsf MAX_RESTARTS=3",
        f"{ELASTIC} --nproc-per-node gpu --nnodes 1:4 {RENDEZVOUS} is_host=1,{TIMES},{FAST} "
        "--max-restarts 3 -m amsf_dist train job.yaml",
    ),
    "deepspeed.sh": ("", f"{DEEPSPEED} {LOCAL}"),
    "deepspeed.sh on two processes": ("NPROC_PER_NODE=2", f"{DEEPSPEED} --num_gpus 2 {LOCAL}"),
    "deepspeed.sh with hosts": ("HOSTFILE=hosts", f"{DEEPSPEED} --hostfile hosts {LOCAL}"),
    "docker.sh": (
        "RUN_AS=1000:1000",
        f"docker run --rm --network host {LIMITS} --ulimit memlock=-1 --gpus all {CLOSED} "
        f"--user 1000:1000 {MOUNTS} amsf-dist:cuda job.yaml",
    ),
    "docker.sh on CPUs, as the image's user": (
        "GPUS= MEMLOCK= RUN_AS= SHM_SIZE=1g NETWORK=none IMAGE=mine NAME=job",
        "docker run --rm --network none --stop-timeout 300 --shm-size 1g --ulimit stack=67108864 "
        f"{CLOSED} --name job {MOUNTS} mine job.yaml",
    ),
    "docker.sh as a node": (
        "RUN_AS= NNODES=1:2 NODE_RANK=1 MASTER_ADDR=a DOCKER_FLAGS=--read-only",
        f"docker run --rm --network host {LIMITS} --ulimit memlock=-1 --gpus all {CLOSED} "
        f"{MOUNTS} --env NNODES=1:2 --env NODE_RANK=1 --env MASTER_ADDR=a --read-only "
        "amsf-dist:cuda job.yaml",
    ),
    "slurm.sbatch": (
        "SLURM_JOB_ID=41234 SLURM_NNODES=2 SLURM_JOB_NODELIST=n3 SLURM_SUBMIT_DIR=/job",
        "NNODES=2 JOB_ID=41234 MASTER_ADDR=n3 MASTER_PORT=21234 srun --kill-on-bad-exit=0 "
        f"bash -c {NODE} /job/launch/torchrun.sh job.yaml",
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_prints_the_command_and_runs_nothing(name: str, tmp_path: Path) -> None:
    settings, expected = COMMANDS[name]
    script = name.partition(" ")[0]
    code, out, err = start(
        script, "--dry-run", "job.yaml", "model.path=a b", settings=settings, cwd=tmp_path
    )
    assert code == 0 and err == ""
    expected = expected.replace("HERE", str(tmp_path))
    assert shlex.split(out) == ["+", *shlex.split(expected), "model.path=a b"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if path.parent == LAUNCH])
@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_a_script_without_a_config_says_how_it_is_used(script: str, words: list[str]) -> None:
    if script == "entrypoint.sh":  # has a default
        return
    code, _, err = start(script, *words)
    assert code == 2 and err.startswith("usage: ") and f"launch/{script} [--dry-run]" in err


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "kubernetes.sh"])
def test_an_unknown_option_is_refused(script: str) -> None:
    code, _, err = start(script, "--fast", "job.yaml")
    assert code == 2 and err.startswith(f"usage: launch/{script}")


def test_several_nodes_need_an_address() -> None:
    code, _, err = start("torchrun.sh", "job.yaml", settings="NNODES=2")
    assert code == 2 and "NNODES=2 needs MASTER_ADDR" in err


def test_preflight_takes_the_place_of_training() -> None:
    _, out, _ = start("torchrun.sh", "--dry-run", "--preflight", "job.yaml")
    assert out.endswith(" -m amsf_dist preflight job.yaml\n")


def test_docker_mounts_what_lies_here(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    _, out, _ = start("docker.sh", "--dry-run", "amsf", "train", "job.yaml", cwd=tmp_path)
    assert f"--volume {tmp_path}/data:/workspace/data:ro " in out and "/models" not in out


@pytest.mark.parametrize(
    ("settings", "words", "expected"),
    [
        ("", "amsf train job.yaml", "amsf train job.yaml"),
        ("NNODES=1", "amsf train job.yaml", "amsf train job.yaml"),
        ("NNODES=2", "amsf memory job.yaml", "amsf memory job.yaml"),
        ("NNODES=2", "python -c 1", "python -c 1"),
        ("NNODES=1:2", "amsf train job.yaml a=1", f"{LAUNCH}/torchrun.sh job.yaml a=1"),
        ("NNODES=2", "amsf preflight job.yaml", f"{LAUNCH}/torchrun.sh --preflight job.yaml"),
        ("", "", "amsf --help"),
    ],
)
def test_the_image_runs_what_it_is_given(settings: str, words: str, expected: str) -> None:
    code, out, _ = start("entrypoint.sh", "--dry-run", *words.split(), settings=settings)
    assert code == 0 and out == f"+ {expected}\n"


def test_the_entrypoint_removes_the_heartbeat_of_the_run_before(tmp_path: Path) -> None:
    (tmp_path / "beat").touch()
    start("entrypoint.sh", "true", settings=f"AMSF_HEARTBEAT={tmp_path}/beat")
    assert not (tmp_path / "beat").exists()


def rendered(*words: str, settings: str = "") -> tuple[str, list[dict[str, Any]]]:
    code, out, err = start("kubernetes.sh", "--dry-run", *words, settings=settings)
    assert code == 0 and err == "" and out.startswith("# + kubectl apply -f -\n")
    return out, list(yaml.safe_load_all(out))


def test_the_manifest_is_one_job_and_its_service() -> None:
    settings = "NNODES=1:4 NAME=big IMAGE=here/image:1 CLAIM=disk GPUS=4 MASTER_PORT=3000"
    out, (service, job) = rendered("runs/job.yaml", 'data.path=a "b"\\', settings=settings)
    assert "${" not in out.replace("fills in ${...}", "")
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"] == "big"
    (container,) = pod["containers"]
    assert container["args"] == ["amsf", "train", "runs/job.yaml", 'data.path=a "b"\\']
    given = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert given["NNODES"] == "1:4" and given["MASTER_ADDR"] == "big-0.big"
    assert given["MASTER_PORT"] == "3000" and container["ports"][0]["containerPort"] == 3000
    shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"]["medium"] == "Memory"
    script = (LAUNCH / "torchrun.sh").read_text()
    saving = int(script.partition("TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-")[2].partition("}")[0])
    assert pod["terminationGracePeriodSeconds"] > saving


def test_the_manifest_is_what_kubernetes_takes(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(rendered("job.yaml")[0])
    out = lint("kubernetes-validate", "--strict", path)
    # a kind that it does not know is passed with a warning
    assert "passed for resource service/amsf" in out and "passed for resource job/amsf" in out
    path.write_text(path.read_text().replace("parallelism:", "paralelism:"))
    assert "paralelism" in lint("kubernetes-validate", "--strict", path, code=1)


def lint(tool: str, *words: object, code: int = 0) -> str:
    """Run a linter of the `test` extra and return all that it says."""
    beside = Path(sys.executable).parent / tool
    found = str(beside) if beside.exists() else shutil.which(tool)
    assert found, f"{tool} is missing: pip install -e '.[test]'"
    done = subprocess.run([found, *map(str, words)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_scripts_are_clean() -> None:
    assert all(os.access(path, os.X_OK) for path in SCRIPTS)
    assert {"torchrun.sh", "docker.sh", "healthcheck.sh"} <= {path.name for path in SCRIPTS}
    lint("shellcheck", *SCRIPTS, ROOT / ".ci" / "run")


def test_the_dockerfiles_are_clean() -> None:
    lint("hadolint", *sorted(ROOT.glob("docker/*Dockerfile")))


def test_the_compose_file_is_what_compose_takes(tmp_path: Path) -> None:
    schema = ("check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    lint(*schema, ROOT / "docker" / "compose.yaml")
    wrong = tmp_path / "compose.yaml"
    wrong.write_text("services: {train: {image: a, shm_sise: 1g}}")
    assert "shm_sise" in lint(*schema, wrong, code=1)


def test_yaml_files_are_clean(tmp_path: Path) -> None:
    manifest = tmp_path / "kubernetes.yaml"
    manifest.write_text(rendered("job.yaml")[0])
    rules = json.dumps({"extends": "relaxed", "rules": {"line-length": "disable"}})
    files = [manifest, *ROOT.glob("docker/*.yaml"), *ROOT.glob("configs/*.yaml")]
    assert lint("yamllint", "--strict", "-d", rules, *files) == ""


def test_the_base_image_has_the_cuda_of_the_torch_wheel() -> None:
    """torch brings CUDA's libraries; the compiler beside them must be of the same CUDA."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    base = text.partition("BASE_IMAGE=nvidia/cuda:")[2].split()[0]
    lock = dict(
        line.split(" ")[0].split("==")
        for line in (ROOT / "docker" / "requirements.lock").read_text().splitlines()
        if "==" in line and not line.startswith(" ")
    )
    assert "@sha256:" in base
    version = base.split(".")[:2]
    for package in ("nvidia-cuda-runtime", "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-cccl"):
        assert lock[package].split(".")[:2] == version


def test_the_lock_has_the_pins_that_tests_run_with_and_names_no_host() -> None:
    text = (ROOT / "docker" / "requirements.lock").read_text()
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    entries = [block for block in text.replace("\\\n", "").splitlines() if block]
    assert all("--hash=sha256:" in entry for entry in entries)
    locked = {entry.split()[0] for entry in entries}
    tested = (ROOT / "constraints.txt").read_text().splitlines()
    for name in ("torch", "transformers", "accelerate", "datasets", "deepspeed", "triton"):
        (pin,) = (line for line in tested if line.startswith(f"{name}=="))
        assert pin in locked
