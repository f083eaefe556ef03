"""DeepSpeed: AMSF by name in its JSON, at every ZeRO stage.

`import amsf_dist` registers the name; DeepSpeed itself is imported by whoever uses it.
"""

from __future__ import annotations

from amsf_dist.integrations.deepspeed.register import register

__all__ = ["register"]
