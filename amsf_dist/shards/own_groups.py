"""Process groups of our own, over the same ranks as a wrapper's.

Inside backward, an all-reduce on the wrapper's own group waits for the gathers that it has queued
there ahead of time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch.distributed as dist

from amsf_dist.shards.layout import Axis

__all__ = ["with_own_group"]


def with_own_group(axis: Axis) -> Axis:
    """The same ranks in a process group of our own; all of them must ask, in the same order."""
    ranks = tuple(dist.get_process_group_ranks(axis.group))
    return replace(axis, group=_own_group(ranks, dist.group.WORLD))


@cache
def _own_group(ranks: tuple[int, ...], world: dist.ProcessGroup) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(list(ranks), use_local_synchronization=True)
    return group
