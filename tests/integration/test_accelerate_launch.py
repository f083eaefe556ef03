"""`accelerate launch` itself, with each file of configs/accelerate, on two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks  # noqa: F401  (sets where DeepSpeed compiles)
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "accelerate_train.py"
LAUNCH = "-m accelerate.commands.launch --num_processes 2 --main_process_port 0".split()
STEPS, BATCH = 8, 16

pytestmark = pytest.mark.xdist_group("accelerate launch")  # they share the run below

Trained = tuple[float, dict[str, Tensor]]


def trained(folder: Path, processes: int, kind: str, *words: object) -> Trained:
    """Held-out loss and weights, both at x, of the example in as many processes, as this kind."""
    told = ("--steps", STEPS, "--batch-size", BATCH // processes, "--output", folder)
    done = subprocess.run(
        [sys.executable, *map(str, [*words, ROOT / "tests" / "without_gpu.py", EXAMPLE, *told])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # DeepSpeed wants ninja
            "PYTHONPATH": str(ROOT),
        },
    )
    told_back = rf"^{processes} processes \({kind}\), held-out loss (\S+)$"
    found = re.search(told_back, done.stdout, re.M)
    assert done.returncode == 0 and found, done.stdout + done.stderr
    return float(found[1]), load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One process, without a launcher, with the same batches."""
    return trained(tmp_path_factory.mktemp("alone"), 1, "NO")


@pytest.mark.parametrize(
    ("file", "kind"),
    [("ddp", "MULTI_CPU"), ("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")],
)
def test_a_launched_run_equals_one_process(
    file: str, kind: str, alone: Trained, tmp_path: Path
) -> None:
    config = ROOT / "configs" / "accelerate" / f"{file}.yaml"
    words = (*LAUNCH, "--config_file", config, "--mixed_precision", "no")
    loss, weights = trained(tmp_path, 2, kind, *words)
    assert loss == pytest.approx(alone[0], rel=1e-5)
    assert weights.keys() == alone[1].keys()
    for name, expected in alone[1].items():
        error = float((weights[name] - expected).norm() / expected.norm())
        assert error < 1e-5, f"{name}: {error:.2e}"
