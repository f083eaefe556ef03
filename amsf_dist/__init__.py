"""AMSF: a sharding-aware, block-wise, Schedule-Free optimizer for FSDP and DeepSpeed."""

from __future__ import annotations

from amsf_dist.audit import explain
from amsf_dist.integrations import accelerate as _accelerate
from amsf_dist.integrations import deepspeed as _deepspeed
from amsf_dist.optimizer import AMSF
from amsf_dist.precision import cast_model
from amsf_dist.release import enable_gradient_release

__all__ = ["AMSF", "__version__", "cast_model", "enable_gradient_release", "explain"]

__version__ = "0.1.0"

_deepspeed.register()  # the name in its JSON
_accelerate.register()  # two of its functions
