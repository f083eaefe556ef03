"""The Triton kernels compile for an H100 and H200, which needs no GPU; and threads read 16 bytes.

In a process of its own: Triton has either its compiler or its interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_code.py"


def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    kernels = json.loads(ran.stdout)
    assert len(kernels) > 20
    for kernel in kernels:
        assert not kernel["local"], f"registers spill: {kernel}"
        if kernel.get("ALIGNED"):
            assert kernel["loads"], kernel
