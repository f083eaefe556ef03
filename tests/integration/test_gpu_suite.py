"""benchmarks/gpu_suite.py runs, from its first part to its last, where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SUITE = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.py"
PARTS = {"check", "copy", "step", "programs", "memory", "graph", "fsdp2", "training", "machine"}


def test_the_suite_runs_in_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    command = [sys.executable, "-W", "ignore", str(SUITE), "--device", "cpu", "--small"]
    ran = subprocess.run(
        [*command, "--json", str(out)], capture_output=True, text=True, timeout=280
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    rows = json.loads(out.read_text())
    assert {row["part"] for row in rows} == PARTS
    assert not [row for row in rows if "FAILED" in f"{row['value']} {row['goal']}"]
