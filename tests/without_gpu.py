"""Run a script that `accelerate launch` has started, on CPUs: `without_gpu.py SCRIPT [ARG ...]`.

accelerate looks for GPUs, and where it finds none it leaves FSDP out, or takes each process for the
only one, without a word. What the script is told is true here but for one thing: under FSDP the
CPU is said to be a GPU.
"""

from __future__ import annotations

import os
import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType


def main() -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        PartialState(backend="gloo")
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
