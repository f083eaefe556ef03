"""Stopped and continued: the same as never stopped, on any number of processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from jobs import metrics, run_as_user, start, train, tree, write_config

pytestmark = pytest.mark.xdist_group("resume")  # they share the runs below

TWO = {"nproc": 2, "parallel": "fsdp2"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two processes without a pause."""
    directory = tmp_path_factory.mktemp("whole")
    train(write_config(directory, **TWO))
    return directory / "run"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first three of them: AMSF has no schedule, so its steps do not know where the end is."""
    directory = tmp_path_factory.mktemp("half")
    train(write_config(directory, **TWO), "steps=3", "save_every=1")
    return directory


def continued(half: Path, directory: Path, **changes: object) -> Path:
    """Continue a copy of the half run to six steps."""
    config = write_config(directory, **changes)
    shutil.copytree(half / "run", directory / "run")
    train(config)
    return directory / "run"


def test_resumed_equals_uninterrupted_bit_for_bit(whole: Path, half: Path, tmp_path: Path) -> None:
    resumed = continued(half, tmp_path, **TWO)
    for kind in ("train", "validation"):
        steps = {step: loss for step, loss in metrics(whole, kind).items() if step > 3}
        assert {s: loss for s, loss in metrics(resumed, kind).items() if s > 3} == steps
    assert list(metrics(resumed, "train")) == [1, 2, 3, 4, 5, 6]
    first, second = (path / "model" / "model.safetensors" for path in (whole, resumed))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"nproc": 3, "parallel": "fsdp2"}, {}],
    ids=["on three processes", "on one, not sharded"],
)
def test_resumed_elsewhere_equals_uninterrupted(
    changes: dict[str, object], whole: Path, half: Path, tmp_path: Path
) -> None:
    resumed = continued(half, tmp_path, **changes)
    for kind in ("train", "validation"):
        assert metrics(resumed, kind)[6] == pytest.approx(metrics(whole, kind)[6], rel=2e-6)


def test_an_incomplete_checkpoint_does_not_count(whole: Path, half: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(half, copy)
    checkpoints = copy / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000002", "step_00000003"]
    (checkpoints / "step_00000003" / "job.json").unlink()
    (checkpoints / "step_00000004.tmp").mkdir()
    (tmp_path / "job").mkdir()
    resumed = continued(copy, tmp_path / "job", save_every=4)
    assert metrics(resumed, "train") == pytest.approx(metrics(whole, "train"), rel=2e-6)
    assert not [name for name in tree(resumed) if "tmp" in name]


def test_a_finished_run_is_not_trained_again(whole: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    shutil.copytree(whole, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    out, err = train(config)
    assert "6 steps were done before" in err and "bits per byte" in out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("model.config.hidden_size=64", "model.config.hidden_size is 64, and"),
        ("amsf.lr=1", "amsf.lr is 1, and"),
        ("optimizer=adamw", "adamw.betas is"),
        ("steps=2", "has done 3 already"),
        ("resume=never", "holds a run of 3 steps"),
        ("seed=1", "seed is 1, and"),
    ],
)
def test_another_job_is_refused_in_one_line(
    word: str, expected: str, half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from amsf_dist import cli

    before = tree(half)
    with pytest.raises(SystemExit) as exit:
        cli.main(["train", str(half / "config.yaml"), word])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert expected in error and "output_dir" in error
    assert tree(half) == before


def test_another_text_is_refused(half: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, **TWO)
    shutil.copytree(half / "run", tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    (tmp_path / "text.txt").write_text("other words " * 600)
    _, err = run_as_user(
        "train", config, code=2
    )  # found out by a worker: the launcher adds nothing
    assert [line for line in err.splitlines() if line.startswith("amsf: ")] == [
        err.splitlines()[-1]
    ]
    assert "data.path: the text is not the one" in err and "Traceback" not in err
    before.pop(tmp_path / "text.txt")
    assert all(path.read_bytes() == content for path, content in before.items())


def wait_for_steps(process: subprocess.Popen[str], directory: Path, steps: int) -> None:
    """Wait until a run has written so many lines."""
    path = directory / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count('"train"') < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no step in two minutes"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("changes", "number", "to_group"),
    [
        (TWO, signal.SIGTERM, False),
        (TWO, signal.SIGINT, True),
        ({}, signal.SIGTERM, False),
    ],
    ids=["SIGTERM to the launcher", "Ctrl-C", "SIGTERM to one process"],
)
def test_a_signal_saves_and_the_second_run_continues(
    changes: dict[str, object], number: signal.Signals, to_group: bool, tmp_path: Path
) -> None:
    config = write_config(tmp_path, **changes)
    process = start("train", config, "steps=100000", "eval_every=100000", "save_every=100000")
    wait_for_steps(process, tmp_path / "run", 3)
    (os.killpg if to_group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "Traceback" not in err and "Error" not in err
    done = max(metrics(tmp_path / "run", "train"))
    last = out.splitlines()[-1]
    assert f"stopped by {number.name} after step {done}; saved" in last
    assert f"continue with: amsf train {config}" in last
    assert (tmp_path / "run" / "checkpoints" / f"step_{done:08d}" / "job.json").exists()
    # On one process: faster, and it must not matter.
    words = (f"steps={done + 2}", "eval_every=100000", "nproc=1", "parallel=single")
    _, err = train(config, *words)
    assert f"continuing from {tmp_path / 'run' / 'checkpoints' / f'step_{done:08d}'}" in err
    assert list(metrics(tmp_path / "run", "train")) == list(range(1, done + 3))
