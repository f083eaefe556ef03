"""The numbers in DeepSpeed's `zero_optimization` section that decide memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Buffers"]


@dataclass(frozen=True)
class Buffers:
    """Numbers of elements, with DeepSpeed's own defaults (0.19).

    Attributes:
        reduce_bucket: gradients that are reduced together.
        two_buckets: one fills while the other is reduced (`overlap_comm`, ZeRO-1 and 2).
        prefetch: weights that are gathered ahead (ZeRO-3, as all that follow).
        live: gathered weights at which prefetching stops.
        reuse: weights are kept if they are used again within so many.
        persistent: smaller weights are always gathered.
        sub_group: weights that step together on a rank.
    """

    reduce_bucket: int = 500_000_000
    two_buckets: bool = False
    prefetch: int = 50_000_000
    live: int = 1_000_000_000
    reuse: int = 1_000_000_000
    persistent: int = 100_000
    sub_group: int = 1_000_000_000

    @classmethod
    def of(cls, zero_optimization: Mapping[str, Any]) -> Buffers:
        """Read the section of a DeepSpeed JSON; "auto" and what is left out is the default."""
        keys = {
            "reduce_bucket": "reduce_bucket_size",
            "two_buckets": "overlap_comm",
            "prefetch": "stage3_prefetch_bucket_size",
            "live": "stage3_max_live_parameters",
            "reuse": "stage3_max_reuse_distance",
            "persistent": "stage3_param_persistence_threshold",
            "sub_group": "sub_group_size",
        }
        given = {name: zero_optimization.get(key) for name, key in keys.items()}
        said: dict[str, Any] = {
            name: value if name == "two_buckets" else int(value)
            for name, value in given.items()
            if value is not None and value != "auto"
        }
        return cls(**said)
