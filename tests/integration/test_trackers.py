"""TensorBoard and Weights & Biases, the real packages: they were told what metrics.jsonl says."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import run_as_user, write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

pytestmark = pytest.mark.xdist_group("trackers")  # they share the run below

ONLY_IN_THE_FILE = {"tokens", "others", "stale_by_parameter", "stale_by_block"}
Told = dict[tuple[int, str], float]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """AMSF, stopped after three steps and continued to six, and its baseline."""
    directory = tmp_path_factory.mktemp("tracked")
    log = {"tensorboard": True, "wandb": True, "diagnostics_every": 2}
    config = write_config(directory, compare=["adamw"], log=log)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WANDB_MODE", "offline")
        for place in ("CACHE", "CONFIG", "DATA"):  # the user's own stay as they are
            patched.setenv(f"WANDB_{place}_DIR", str(directory / "wandb"))
        run_as_user("train", config, "steps=3", "compare=[]")
        run_as_user("train", config)
    return [directory / "run", directory / "run" / "adamw"]


def expected(run: Path) -> Told:
    """The lines of metrics.jsonl under the names that trackers are given."""
    told: Told = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        kind, step = line.pop("kind"), line.pop("step")
        values = line.pop("owners") if kind == "memory" else line
        told |= {(step, f"{kind}/{n}"): v for n, v in values.items() if n not in ONLY_IN_THE_FILE}
    return told


def records(path: Path) -> Iterator[Record]:
    """What is in a run file: LevelDB's log, a header of 7 bytes, then blocks of 32 KiB."""
    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:  # no room for the head of a record
            at += left
            continue
        _, size, part = struct.unpack_from("<IHB", data, at)  # checksum, bytes, where in the record
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if part in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def history(path: Path) -> Told:
    told: Told = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            told |= {(row["_step"], name): v for name, v in row.items() if not name.startswith("_")}
    return told


def test_wandb_was_told_what_the_file_says(runs: list[Path]) -> None:
    for run in runs:
        found: Told = {}
        for path in (run / "wandb").glob("offline-run-*/*.wandb"):
            found |= history(path)
        assert found == expected(run) and (6, "train/loss") in found
    assert (2, "optimizer/stale") in expected(runs[0])


def test_a_continued_run_is_the_same_one_of_wandb_and_its_baseline_another(
    runs: list[Path],
) -> None:
    ids, steps = [], []
    for run in runs:
        for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
            (begun,) = (one.run for one in records(path) if one.HasField("run"))
            ids.append(begun.run_id)
            steps.append({step for step, _ in history(path)})
            assert begun.display_name == str(run)
    assert ids[0] == ids[1] != ids[2]
    assert steps == [{1, 2, 3}, {4, 5, 6}, {1, 2, 3, 4, 5, 6}]


def test_tensorboard_was_told_what_the_file_says(runs: list[Path]) -> None:
    for run in runs:
        events = EventAccumulator(str(run / "tensorboard")).Reload()
        found = {
            (scalar.step, name): scalar.value
            for name in events.Tags()["scalars"]
            for scalar in events.Scalars(name)
        }
        assert found == pytest.approx(expected(run), rel=1e-6)  # it keeps 32 bits
