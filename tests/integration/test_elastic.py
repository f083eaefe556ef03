"""launch/torchrun.sh with two nodes on one machine: lost, come back, stopped, never there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from agents import Node, free_port, until
from jobs import metrics, run_as_user, train, write_config

from amsf_dist.train import checkpoint

pytestmark = pytest.mark.xdist_group("elastic")
JOB = {
    "nproc": "auto",
    "parallel": "fsdp2",
    "steps": 100000,
    "eval_every": 100000,
    "save_every": 10,
}


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    """Whatever is started here is gone afterwards."""
    started: list[Node] = []
    yield started
    for node in started:
        node.kill()


def steps(directory: Path) -> int:
    """Steps in metrics.jsonl."""
    path = directory / "run" / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def saved(directory: Path) -> int:
    """Steps in the newest complete checkpoint."""
    found = checkpoint.latest(directory / "run" / "checkpoints")
    return found.step if found else 0


def started(node: Node, size: int) -> int:
    """How often training began on so many processes, told by the node with process 0."""
    return len(re.findall(rf"fsdp2 on {size} cpu process", node.says()))


def test_a_lost_node_is_left_out_and_one_that_comes_joins(
    nodes: list[Node], tmp_path: Path
) -> None:
    config = write_config(tmp_path, **JOB)
    elastic = {"NNODES": "1:2", "MASTER_PORT": free_port()}
    heartbeat = tmp_path / "beat"

    def node(number: int, name: str) -> Node:
        beat = {"AMSF_HEARTBEAT": heartbeat} if number == 0 else {}
        found = Node(tmp_path / f"{name}.log", config, NODE_RANK=number, **elastic, **beat)
        nodes.append(found)
        return found

    first, second = node(0, "first"), node(1, "second")

    def size_is(size: int, times: int) -> bool:
        return started(first, size) + sum(started(other, size) for other in nodes[1:]) >= times

    until("two nodes train", lambda: size_is(2, 1) and saved(tmp_path) >= 10, first, second)
    second.kill()
    lost_at = saved(tmp_path)
    until("the survivor goes on", lambda: size_is(1, 1) and saved(tmp_path) > lost_at, first)
    assert re.search(r"continuing from \S+/step_0", first.says())
    before = started(first, 2)
    third = node(1, "third")
    until(
        "the node that comes joins",
        lambda: started(first, 2) + started(third, 2) > before,
        first,
        third,
    )
    joined_at = saved(tmp_path)
    until("and both go on", lambda: saved(tmp_path) > joined_at, first, third)
    assert heartbeat.exists()
    for running in (first, third):
        running.stop()
    assert (first.wait(), third.wait()) == (143, 143), first.says() + third.says()

    done = saved(tmp_path)
    losses = metrics(tmp_path / "run", "train")
    assert list(losses) == list(range(1, done + 1))  # the stop saved the last step
    whole = tmp_path / "whole"
    whole.mkdir()
    words = (f"steps={done}", "parallel=single", f"save_every={done}")
    train(write_config(whole, **JOB), *words)
    assert losses == pytest.approx(metrics(whole / "run", "train"), rel=2e-5)


def test_a_node_that_is_stopped_leaves_the_others_training(
    nodes: list[Node], tmp_path: Path
) -> None:
    config = write_config(tmp_path, **JOB)
    elastic = {"NNODES": "1:2", "MASTER_PORT": free_port()}
    for number in (0, 1):
        nodes.append(Node(tmp_path / f"{number}.log", config, NODE_RANK=number, **elastic))
    first, second = nodes
    until("two nodes train", lambda: saved(tmp_path) >= 10, first, second)
    second.stop()
    assert second.wait() == 143, second.says()
    at = saved(tmp_path)
    until("the other goes on", lambda: started(first, 1) > 0 and saved(tmp_path) > at, first)
    first.stop()
    assert first.wait() == 143, first.says()


def test_done_is_zero_and_stopped_is_143(nodes: list[Node], tmp_path: Path) -> None:
    config = write_config(tmp_path, **JOB)
    whole = Node(tmp_path / "done.log", config, "steps=2", NPROC_PER_NODE=2)
    nodes.append(whole)
    assert whole.wait() == 0, whole.says()
    stopped = Node(tmp_path / "stopped.log", config, NPROC_PER_NODE=2)
    nodes.append(stopped)
    until("it trains", lambda: steps(tmp_path) >= 4, stopped)
    stopped.stop()
    assert stopped.wait() == 143, stopped.says()
    assert "Traceback" not in stopped.says()
    assert saved(tmp_path) == max(metrics(tmp_path / "run", "train"))


@pytest.mark.parametrize(
    ("rank", "says"),
    [(0, "fewer than 2 nodes came to 127.0.0.1"), (1, "no connection to 127.0.0.1")],
)
def test_nodes_that_do_not_come_are_one_line(
    rank: int, says: str, nodes: list[Node], tmp_path: Path
) -> None:
    config = write_config(tmp_path, **JOB)
    alone = Node(
        tmp_path / "alone.log",
        config,
        NNODES=2,
        NODE_RANK=rank,
        MASTER_PORT=free_port(),
        RDZV_TIMEOUT=5,
    )
    nodes.append(alone)
    assert alone.wait() == 1
    (line,) = (line for line in alone.says().splitlines() if line.startswith("amsf: "))
    assert says in line and "Traceback" not in alone.says(), alone.says()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("output_dir=/dev/null", "/dev/null is a file"),
        ("data.path=/no/text", "/no/text does not exist"),
        ("shard_degree=2", "1 node of 1 processes: the number of processes (1) must be a multiple"),
    ],
    ids=["output", "text", "shards"],
)
def test_what_no_worker_could_do_is_said_once(
    nodes: list[Node], tmp_path: Path, override: str, says: str
) -> None:
    config, elastic = write_config(tmp_path, **JOB), {"NNODES": "1:2", "MASTER_PORT": free_port()}
    alone = Node(tmp_path / "alone.log", config, override, NODE_RANK=0, **elastic)
    nodes.append(alone)
    assert alone.wait() == 2  # and no worker was started, ten times over
    assert alone.says().count("amsf: ") == 1 and says in alone.says()


def test_preflight_on_two_nodes(nodes: list[Node], tmp_path: Path) -> None:
    config = write_config(tmp_path, **JOB)
    port = free_port()
    for rank in (0, 1):
        settings = {"NNODES": 2, "NODE_RANK": rank, "MASTER_PORT": port}
        nodes.append(Node(tmp_path / f"{rank}.log", "--preflight", config, **settings))
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].says() + nodes[1].says()
    told = nodes[0].says() + nodes[1].says()
    for line in ("config: ok", "all-reduce: 2 processes", "checkpoint: written", "passed"):
        assert told.count(line) == 1
    assert told.count(": shared memory: ") == 2 and not (tmp_path / "run").exists()


def test_preflight_of_one_machine(tmp_path: Path) -> None:
    config = write_config(tmp_path, nproc=2, parallel="fsdp2")
    out, _ = run_as_user("preflight", config)
    assert out.splitlines()[-1] == "preflight: passed" and "all-reduce: 2 processes" in out
    assert not (tmp_path / "run").exists()
    _, err = run_as_user("preflight", config, "amsf.lr=-1", code=2)
    assert err.startswith("amsf: amsf: ") and err.count("\n") == 1
