"""What every test needs: one thread a process, so that two cores serve several ranks."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # Triton kernels run in its interpreter; read when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
