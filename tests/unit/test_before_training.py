"""What is seen before the first step, what is touched after each, and how a stopped job leaves."""

from __future__ import annotations

import os
import resource
import socket
import time
from pathlib import Path

import pytest
from jobs import tree, write_config
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousStateError,
    RendezvousTimeoutError,
)
from torch.distributed.run import parse_args

from amsf_dist.train import elastic, machine, stopped
from amsf_dist.train.config_file import load_config
from amsf_dist.train.errors import UserError
from amsf_dist.train.heartbeat import beat
from amsf_dist.train.parallel import join
from amsf_dist.train.rehearsal import try_writing

NODES = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.0.0.1:29500", "--nproc-per-node", "2"]


def words(config: Path, *more: str) -> list[str]:
    return [*NODES, *more, "-m", "amsf_dist", "train", str(config)]


@pytest.mark.parametrize("local_rank, touched", [("0", True), ("1", False), (None, True)])
def test_the_first_process_of_a_machine_has_the_heartbeat(
    local_rank: str | None, touched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    beat()
    monkeypatch.setenv("AMSF_HEARTBEAT", str(tmp_path / "beat"))
    beat()
    assert (tmp_path / "beat").exists() == touched
    monkeypatch.setenv("AMSF_HEARTBEAT", str(tmp_path / "missing" / "beat"))
    beat()  # it gets old, and training goes on


def test_a_heartbeat_is_as_old_as_the_last_beat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "beat"
    monkeypatch.setenv("AMSF_HEARTBEAT", str(file))
    file.touch()
    os.utime(file, (0, 0))
    beat()
    assert time.time() - file.stat().st_mtime < 60


@pytest.mark.parametrize(
    ("environment", "asked_here", "launched", "code"),
    [
        ({}, True, False, 0),
        ({"AMSF_STOP_CODE": "143"}, True, False, 143),
        ({"AMSF_STOP_CODE": "143", "RANK": "0"}, True, False, 0),  # the launcher has the last word
        ({"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_MAX_RESTARTS": "3"}, True, False, 0),
        ({"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_MAX_RESTARTS": "3"}, False, False, 75),
        ({"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_MAX_RESTARTS": "0"}, False, False, 0),
        ({"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_MAX_RESTARTS": "3"}, False, True, 0),
    ],
)
def test_the_exit_code_of_a_job_that_was_stopped(
    environment: dict[str, str],
    asked_here: bool,
    launched: bool,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "AMSF_STOP_CODE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert stopped.exit_code(asked_here, launched) == code


def test_the_first_process_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(stopped.PROGRESS_FILE, raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    stopped.tell("training")
    assert stopped.progress() == "nothing"
    monkeypatch.setenv(stopped.PROGRESS_FILE, str(tmp_path / "progress"))
    assert stopped.progress() == "nothing"
    stopped.tell("stopped")
    monkeypatch.setenv("LOCAL_RANK", "1")
    stopped.tell("training")
    assert stopped.progress() == "stopped"


def test_every_finding_that_is_not_fine_has_a_way_out(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, nproc="auto", parallel="fsdp2", device="auto"))
    found = [
        machine.gpus(config, 8, 4),
        machine.shared(64 << 20, needed=True),
        machine.locked_memory(65536, infiniband=True),
    ]
    assert [finding.level for finding in found] == ["failure", "warning", "warning"]
    for finding, cure in zip(found, ("nproc=4", "--shm-size", "--ulimit memlock=-1"), strict=True):
        assert cure in finding.text and "\n" not in finding.text


def test_what_is_fine_is_fine(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, nproc="auto", parallel="fsdp2", device="auto"))
    for finding in (
        machine.gpus(config, 8, 8),
        machine.gpus(config, 2, 8),
        machine.gpus(config, 2, 0),
        machine.shared(64 << 20, needed=False),
        machine.shared(16 << 30, needed=True),
        machine.locked_memory(resource.RLIM_INFINITY, infiniband=True),
        machine.locked_memory(65536, infiniband=False),
    ):
        assert finding.level == "ok"
    assert len(machine.findings(config, 2)) == 3


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = machine.free_port(port)
        assert finding.level == "failure" and f"port {port}: taken" in finding.text
    assert machine.free_port(port).level == "ok"


def test_a_rehearsed_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    config = load_config(path, [f"output_dir={tmp_path}/a/b/c"])
    with join(config) as world:
        before = tree(tmp_path)
        try_writing(config, world)
        assert tree(tmp_path) == before
        (tmp_path / "file").touch()
        wrong = load_config(path, [f"output_dir={tmp_path}/file/run"])
        with pytest.raises(UserError, match="output_dir: .*give a directory"):
            try_writing(wrong, world)


def test_a_number_of_nodes_that_the_batch_does_not_divide_over_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path, nproc="auto", parallel="fsdp2", global_batch_size=8)
    elastic.check(parse_args(words(config, "--nnodes", "1:2")))
    with pytest.raises(UserError, match="3 nodes of 2 processes: global_batch_size"):
        elastic.check(parse_args(words(config, "--nnodes", "1:4")))


def test_a_taken_port_is_refused_by_the_node_that_opens_it(tmp_path: Path) -> None:
    config = write_config(tmp_path, nproc="auto", parallel="fsdp2", global_batch_size=8)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        more = ["--nnodes", "2", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf"]
        elastic.check(parse_args(words(config, *more, "is_host=0")))
        with pytest.raises(UserError, match=f"port {port}: taken .* MASTER_PORT"):
            elastic.check(parse_args(words(config, *more, "is_host=1")))


def test_gpus_that_are_not_there_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, nproc="auto", parallel="fsdp2")
    code = elastic.main(["--nproc-per-node", "gpu", "-m", "amsf_dist", "train", str(config)])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "NPROC_PER_NODE=2" in error
    assert stopped.PROGRESS_FILE not in os.environ  # jobs that this process runs later do not tell


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RendezvousTimeoutError(), "fewer than 2 nodes came to 10.0.0.1:29500 in time"),
        (RendezvousConnectionError("x"), "no connection to 10.0.0.1:29500; see that node 0"),
        (RendezvousClosedError(), "has ended; start it again on every node"),
        (RendezvousStateError("a\nb"), "rendezvous at 10.0.0.1:29500: a b"),
    ],
)
def test_a_rendezvous_that_fails_is_one_line(error: Exception, says: str, tmp_path: Path) -> None:
    arguments = parse_args(words(tmp_path / "job.yaml", "--nnodes", "2:4"))
    told = elastic.explain(error, arguments)
    assert says in told and "\n" not in told
