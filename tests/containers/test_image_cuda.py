"""The image with CUDA wheels, as far as that goes without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import engine as own
import pytest
from engine import DOCKER, ROOT, run

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def image(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The CUDA image on the stand-in base; every hash of the lock is checked."""
    return own.build("amsf-test:cuda", tmp_path_factory.mktemp("context"), cpu=False)


def python(image: str, code: str, *words: str, seconds: float = 200) -> str:
    return run(DOCKER, "run", "--rm", *words, image, "python", "-c", code, seconds=seconds)


def test_torch_and_nccl_are_those_of_the_lock(image: str) -> None:
    said = python(
        image,
        "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.nccl.version(), "
        "'sm_90' in torch.cuda.get_arch_list())",
    )
    lock = (ROOT / "docker" / "requirements.lock").read_text()
    nccl = tuple(map(int, lock.partition("nvidia-nccl-cu13==")[2].split()[0].split(".")))
    assert re.search(r"2\.13\.0\S* 13\.0 ", said) and f"{nccl} True" in said


def test_only_the_driver_is_missing(image: str) -> None:
    script = "cd /opt/venv/lib/python3*/site-packages/torch/lib && ldd *.so | grep 'not found'"
    said = run(DOCKER, "run", "--rm", "--entrypoint", "bash", image, "-c", script, code=None)
    missing = {line.split()[0] for line in said.splitlines() if "not found" in line}
    assert missing <= {"libcuda.so.1"}


def test_deepspeed_finds_a_compiler_for_this_cuda(image: str, tmp_path: Path) -> None:
    script = """
      nvcc=$CUDA_HOME/bin/nvcc
      $nvcc --version | grep -o 'release 13.0'
      echo '__global__ void f(float* x) { x[0] += 1; } int main() { f<<<1, 1>>>(0); }' >/tmp/a.cu
      $nvcc -arch=sm_90 -I$CUDA_HOME/include -L$CUDA_HOME/lib -o /tmp/a /tmp/a.cu && echo compiled
    """
    said = run(DOCKER, "run", "--rm", "--entrypoint", "bash", image, "-ec", script)
    assert "release 13.0" in said and "compiled" in said


def test_two_processes_train_on_cpus(image: str) -> None:
    words = "amsf train configs/quickstart.yaml output_dir=runs/job compare=[] steps=2".split()
    words += ["eval_batches=2", "sample.tokens=0", "log.every=1"]
    closed = (
        "--read-only --tmpfs /tmp:exec --tmpfs /cache:exec,mode=1777 "
        "--tmpfs /workspace/runs:mode=1777 --cap-drop ALL --network none"
    ).split()
    said = run(DOCKER, "run", "--rm", *closed, image, *words, seconds=300)
    assert "fsdp2 on 2 cpu processes" in said and "bits per byte" in said
