"""Compile what DeepSpeed compiles on its first use, before tests with time limits need it."""

from __future__ import annotations

import ranks  # noqa: F401  (sets where it is compiled)

from amsf_dist.train.zero.start import build_cpu_collective

if __name__ == "__main__":
    build_cpu_collective()
