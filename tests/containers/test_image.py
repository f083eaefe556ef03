"""The image for CPUs, built and run: what is in it, two processes, two nodes, stop, health."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import engine as own
import pytest
from engine import DOCKER, ROOT, run, until

pytestmark = pytest.mark.timeout(1200)

CLOSED = (
    "--read-only --tmpfs /tmp:exec --cap-drop ALL --security-opt no-new-privileges --shm-size 512m "
    "--volume amsf-cache:/cache"
).split()
JOB = ("amsf", "train", "configs/quickstart.yaml", "output_dir=runs/job", "compare=[]")
SMALL = ("global_batch_size=4", "data.sequence_length=64", "eval_batches=2", "sample.tokens=0")
ENDLESS = (*JOB, *SMALL, "steps=100000", "eval_every=100000", "save_every=10", "log.every=1")


@pytest.fixture(scope="module")
def image(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The CPU image."""
    return own.build("amsf-test:cpu", tmp_path_factory.mktemp("context"), cpu=True)


@pytest.fixture
def containers(engine: Path) -> Iterator[list[str]]:
    """Names of containers to remove afterwards."""
    names: list[str] = []
    yield names
    if names:
        run(DOCKER, "rm", "-f", *names, code=None)


def inspect(name: str, template: str) -> str:
    return run(DOCKER, "inspect", "--format", template, name).strip()


def logs(name: str) -> str:
    return run(DOCKER, "logs", name)


def saved(runs: Path) -> int:
    """Steps in the newest complete checkpoint."""
    found = (runs / "job" / "checkpoints").glob("step_????????/job.json")
    return max((int(path.parent.name[5:]) for path in found), default=0)


def losses(runs: Path) -> dict[int, float]:
    lines = map(json.loads, (runs / "job" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def test_what_the_image_says_of_itself(image: str) -> None:
    config = json.loads(inspect(image, "{{json .Config}}"))
    assert config["User"] == "10001:10001" and config["WorkingDir"] == "/workspace"
    assert config["Entrypoint"] == ["/usr/bin/tini", "--", "/opt/amsf/launch/entrypoint.sh"]
    assert config["Healthcheck"]["Test"] == ["CMD", "/opt/amsf/docker/healthcheck.sh"]
    labels = {key.rpartition(".")[2]: value for key, value in config["Labels"].items()}
    assert labels["title"] == "amsf-dist" and labels["revision"] == "tested"
    assert (
        labels["licenses"] == "Apache-2.0"
        and labels["version"] in (ROOT / "pyproject.toml").read_text()
    )


def test_nothing_of_the_build_is_left(image: str) -> None:
    bundle = "sha256sum /etc/ssl/certs/ca-certificates.crt"
    plain = run(DOCKER, "run", "--rm", "--entrypoint", "sh", own.BASE, "-c", bundle)
    script = f"""{bundle}
      find / -xdev -path /usr/share/python-wheels -prune -o -type f \\
        ( -name '*.whl' -o -name uv -o -name pip.conf -o -name uv.toml ) -print
      ls -d /src /opt/uv /root/.cache /docker 2>/dev/null
      true"""
    script = script.replace("( ", "\\( ").replace(" )", " \\)")
    as_root = ("--rm", "--user", "0", "--entrypoint", "sh")
    found = run(DOCKER, "run", *as_root, image, "-c", script)
    assert found == plain, found
    told = run(DOCKER, "history", "--no-trunc", image) + inspect(image, "{{json .Config.Env}}")
    assert "://" not in told


@pytest.mark.parametrize("user", [None, "4321:4321"], ids=["its own user", "another"])
def test_everything_imports_as_a_user(user: str | None, image: str) -> None:
    code = (
        "import ctypes, getpass, os, accelerate, deepspeed, torch, transformers, amsf_dist; "
        "ctypes.CDLL('libibverbs.so.1'); ctypes.CDLL('libnuma.so.1'); "
        "open('/cache/file', 'w').close(); open('/workspace/runs/file', 'w').close(); "
        "print(getpass.getuser(), os.getuid(), os.getgid())"
    )
    words = ("--user", user) if user else ()
    said = run(DOCKER, "run", "--rm", *words, image, "python", "-c", code)
    assert said.splitlines()[-1] == f"amsf {(user or '10001:10001').replace(':', ' ')}"


def test_the_quickstart_runs_closed_in(image: str, runs: Path) -> None:
    settings = {"DOCKER": DOCKER, "IMAGE": image, "RUNS": str(runs), "RUN_AS": "", "GPUS": ""}
    settings |= {"MEMLOCK": "8388608", "SHM_SIZE": "512m", "NETWORK": "none"}
    settings["DOCKER_FLAGS"] = "--read-only --tmpfs /tmp:exec"
    script = ROOT / "launch" / "docker.sh"
    words = (*JOB, "steps=6", "eval_every=3", "eval_batches=2", "log.every=1")
    said = run(script, *words, seconds=200, env={**os.environ, **settings}, cwd=runs)
    assert "fsdp2 on 2 cpu processes" in said and "bits per byte" in said
    assert list(losses(runs)) == [1, 2, 3, 4, 5, 6]
    assert (runs / "job" / "model" / "model.safetensors").stat().st_uid == 10001


def test_stopped_it_has_saved_and_says_143_and_goes_on(
    image: str, runs: Path, containers: list[str]
) -> None:
    containers.append("amsf-stop")
    health = ("--health-interval", "1s")
    mount = ("--volume", f"{runs}:/workspace/runs")
    words = ("--name", "amsf-stop", *CLOSED, *health, *mount, image, *ENDLESS)
    run(DOCKER, "run", "--detach", *words)
    until("it trains", lambda: saved(runs) >= 10)
    until("healthy", lambda: inspect("amsf-stop", "{{.State.Health.Status}}") == "healthy", 30)
    run(DOCKER, "stop", "--time", "100", "amsf-stop")
    assert inspect("amsf-stop", "{{.State.ExitCode}}") == "143", logs("amsf-stop")
    assert "stopped by SIGTERM after step" in logs("amsf-stop")
    done = saved(runs)
    assert done == max(losses(runs))
    run(DOCKER, "start", "amsf-stop")
    until("it goes on", lambda: saved(runs) > done)
    assert f"continuing from runs/job/checkpoints/step_{done:08d}" in logs("amsf-stop")


def test_without_a_heartbeat_it_is_unhealthy(image: str, containers: list[str]) -> None:
    containers.append("amsf-idle")
    health = ("--health-interval", "1s", "--health-start-period", "1s", "--health-retries", "1")
    run(DOCKER, "run", "--detach", "--name", "amsf-idle", *health, image, "sleep", "60")
    until("unhealthy", lambda: inspect("amsf-idle", "{{.State.Health.Status}}") == "unhealthy", 30)
    run(DOCKER, "exec", "amsf-idle", "touch", "/tmp/amsf-heartbeat")
    until("healthy", lambda: inspect("amsf-idle", "{{.State.Health.Status}}") == "healthy", 30)


def test_compose_starts_two_nodes_and_nothing_for_gpus(
    image: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = own.compose(tmp_path / "compose")
    words = [*JOB, *SMALL, "steps=4", "eval_every=4", "log.every=1"]
    bridge = {"driver_opts": {"com.docker.network.bridge.name": "br-amsf1"}}
    nodes = ("node0", "node1")
    # NNODES: the file's 1:2 would let a node begin, and end, without one that is slow to start.
    short = {"command": words, "environment": {"NNODES": "2"}}
    over = {"services": dict.fromkeys(nodes, short), "networks": {"nodes": bridge}}
    (tmp_path / "short.yaml").write_text(json.dumps(over))
    project = (*tool, "-f", ROOT / "docker" / "compose.yaml")
    two = (*project, "-f", tmp_path / "short.yaml", "--profile", "cpu")
    monkeypatch.setenv("AMSF_CPU_IMAGE", image)
    monkeypatch.setenv("AMSF_USER", "1234:1234")
    assert set(run(*two, "config", "--services").split()) == set(nodes)
    train = json.loads(run(*project, "--profile", "gpu", "config", "--format", "json"))["services"]
    assert train.keys() == {"train"} and train["train"]["network_mode"] == "host"
    assert train["train"]["volumes"][0]["source"] == "runs"  # a volume, unless told otherwise
    monkeypatch.setenv("AMSF_RUNS", str(runs))
    try:
        said = run(*two, "up", seconds=200)
        codes = {name: inspect(f"amsf-{name}-1", "{{.State.ExitCode}}") for name in nodes}
    finally:
        run(*two, "down", "--volumes", code=None)
    assert codes == {"node0": "0", "node1": "0"}, said
    assert "fsdp2 on 2 cpu processes" in said and list(losses(runs)) == [1, 2, 3, 4]
    assert (runs / "job" / "model" / "model.safetensors").stat().st_uid == 1234


def test_two_nodes_lose_one_and_take_it_back(image: str, runs: Path, containers: list[str]) -> None:
    bridge = ("--opt", "com.docker.network.bridge.name=br-amsf0")
    run(DOCKER, "network", "create", *bridge, "amsf-nodes")
    try:
        for rank in (0, 1):
            name = f"amsf-node{rank}"
            containers.append(name)
            settings = {"NNODES": "1:2", "NODE_RANK": rank, "MASTER_ADDR": "amsf-node0"}
            settings |= {"NPROC_PER_NODE": 1, "OMP_NUM_THREADS": 1}
            given = [word for key, value in settings.items() for word in ("-e", f"{key}={value}")]
            where = ("--network", "amsf-nodes", "--hostname", name, "--name", name)
            mount = ("--volume", f"{runs}:/workspace/runs")
            run(DOCKER, "run", "--detach", *CLOSED, *where, *mount, *given, image, *ENDLESS)

        def began(size: int) -> int:
            said = logs("amsf-node0") + logs("amsf-node1")
            return len(re.findall(rf"fsdp2 on {size} cpu process", said))

        until("two nodes train", lambda: began(2) >= 1 and saved(runs) >= 10)
        run(DOCKER, "kill", "amsf-node1")
        lost_at = saved(runs)
        until("the survivor goes on", lambda: began(1) >= 1 and saved(runs) > lost_at)
        together = began(2)
        run(DOCKER, "start", "amsf-node1")
        until("the node that comes back joins", lambda: began(2) > together)
        joined_at = saved(runs)
        until("and both go on", lambda: saved(runs) > joined_at)
        run(DOCKER, "stop", "--time", "100", "amsf-node0", "amsf-node1")
        for rank in (0, 1):
            code = inspect(f"amsf-node{rank}", "{{.State.ExitCode}}")
            assert code == "143", logs(f"amsf-node{rank}")
    except BaseException:
        for rank in (0, 1):
            print(run(DOCKER, "logs", f"amsf-node{rank}", code=None)[-6000:])
        raise
    finally:
        run(DOCKER, "rm", "-f", *containers, code=None)
        run(DOCKER, "network", "rm", "amsf-nodes", code=None)
    found = losses(runs)
    assert list(found) == list(range(1, saved(runs) + 1))
    early, late = list(found.values())[:5], list(found.values())[-5:]
    assert sum(late) < sum(early)
