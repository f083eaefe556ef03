"""`amsf train` with gradient release: the same run, with less memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import metrics, write_config
from jobs import train as train_job

TWO = {"nproc": 2, "parallel": "fsdp2"}


def train(directory: Path, **changes: object) -> Path:
    """Train the small job with changes and return its folder."""
    directory.mkdir()
    train_job(write_config(directory, eval_every=1, **changes))
    return directory / "run"


def owners(directory: Path) -> dict[str, dict[str, int]]:
    """Bytes by owner of a finished run, and of what it is compared with."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    line = next(line for line in lines if line["kind"] == "memory")
    return {"run": line["owners"], **line["others"]}


def test_released_on_two_processes_is_the_ordinary_run_on_one(tmp_path: Path) -> None:
    one = train(tmp_path / "one", clip="block")
    two = train(tmp_path / "two", clip="block", release=True, accumulation={"steps": 3}, **TWO)
    for kind in ("train", "validation"):
        assert metrics(two, kind) == pytest.approx(metrics(one, kind), rel=5e-6, abs=0)
    kept = owners(two)["run"]
    assert kept["gradients"] == kept["weights"]  # exact accumulation adds them up


def test_into_the_state_no_gradient_is_kept_and_the_chart_shows_it(tmp_path: Path) -> None:
    options = {"release": True, "compare": ["adamw"]}
    accumulation = {"steps": 3, "mode": "state"}
    directory = train(tmp_path / "state", accumulation=accumulation, **options, **TWO)
    losses = list(metrics(directory, "validation", "bits_per_byte").values())
    assert losses[-1] < losses[0]
    found = owners(directory)
    assert found["run"]["gradients"] < 0.4 * found["run"]["weights"]
    ordinary = found["AMSF without release (computed)"]
    assert ordinary["gradients"] == ordinary["weights"] == found["run"]["weights"]
    assert (directory / "memory.png").stat().st_size > 10_000
    norms = metrics(directory, "train", "grad_norm")
    assert all(norm > 0 for norm in norms.values())
