"""DeepSpeed: AMSF by name in its JSON, at every ZeRO stage.

`import amsf_dist` registers the name; DeepSpeed itself is imported by whoever uses it. The names
here are for checkpoints that go between engines (docs/deepspeed.md).
"""

from __future__ import annotations

from amsf_dist.integrations.deepspeed.full import full_state_dicts
from amsf_dist.integrations.deepspeed.hooks import register
from amsf_dist.integrations.deepspeed.loading import load_state_dict
from amsf_dist.integrations.deepspeed.universal import to_universal

__all__ = ["full_state_dicts", "load_state_dict", "register", "to_universal"]
