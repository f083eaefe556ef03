"""launch/slurm.sbatch with stand-ins for Slurm's commands: what puts a job in the queue again.

docs/launch.md says what was seen under a real Slurm.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launched import LAUNCH

COMMANDS = {
    "srun": """trap 'exit {code}' TERM
        echo $$ >step.tmp && mv step.tmp step
        while [[ ! -e go ]]; do sleep 0.02; done""",
    "scancel": 'echo "scancel $*" >>told; kill -TERM "$(<step)"',
    "scontrol": 'echo "scontrol $*" >>told',
}


def job(folder: Path, code: int) -> subprocess.Popen[bytes]:
    """The script as Slurm would start it; its step leaves with `code` when it is told to stop."""
    for name, text in COMMANDS.items():
        (folder / name).write_text("#!/usr/bin/env bash\n" + text.replace("{code}", str(code)))
        (folder / name).chmod(0o755)
    process = subprocess.Popen(
        [str(LAUNCH / "slurm.sbatch"), "job.yaml"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
    )
    deadline = time.monotonic() + 30
    while not (folder / "step").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return process


def told(folder: Path) -> list[str]:
    path = folder / "told"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("code", "after"),
    [(143, ["scontrol requeue 7"]), (1, []), (0, [])],
    ids=["saved", "could not save", "done just then"],
)
def test_near_the_end_of_its_time_a_job_that_saved_goes_on(
    tmp_path: Path, code: int, after: list[str]
) -> None:
    process = job(tmp_path, code)
    process.send_signal(signal.SIGUSR1)  # what #SBATCH --signal=B:USR1 does
    assert process.wait(30) == code
    assert told(tmp_path) == ["scancel --signal=TERM 7", *after]


def test_a_job_that_is_cancelled_or_done_stays_out_of_the_queue(tmp_path: Path) -> None:
    for name, code in (("cancelled", 143), ("done", 0)):
        (tmp_path / name).mkdir()
        process = job(tmp_path / name, code)
        if code:  # scancel --signal=TERM reaches the step, not the script
            os.kill(int((tmp_path / name / "step").read_text()), signal.SIGTERM)
        else:
            (tmp_path / name / "go").touch()
        assert process.wait(30) == code
        assert told(tmp_path / name) == []


def test_slurm_is_asked_to_signal_the_script() -> None:
    assert "\n#SBATCH --signal=B:USR1@300\n" in (LAUNCH / "slurm.sbatch").read_text()
