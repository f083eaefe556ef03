"""State beside the weights: its names, its creation, the counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amsf_dist.kernels.grouping import num_groups
from amsf_dist.kernels.holding import WEIGHT
from amsf_dist.rules import Rule
from amsf_dist.shards import Layout
from amsf_dist.storage import Storage
from amsf_dist.storage.grouped import SCALE_DTYPE

__all__ = ["MOMENT", "MOMENTS", "STASH", "WEIGHT", "Counters", "create", "number"]

MOMENT = "exp_avg_sq"
MOMENTS = (MOMENT, "exp_avg_sq_col", "exp_avg_sq_mean")
"""Block moments, a vector for each way in which a parameter is cut: most have the first alone."""
STASH = "y"
"""Exact training weights, kept only while the parameters hold x."""


class Counters:
    """One fp64 number per parameter and counter, on the device of the weights.

    They live on the device so that a step which turns out not to be finite can be taken back
    without asking the host, and in one vector so that advancing them costs a few launches for all
    parameters together. `state[param]` holds 0-dim views of them under torch's own key "step".
    """

    def __init__(self, rule: Rule, states: Sequence[dict[str, Any]], device: torch.device) -> None:
        """Take over what the states hold (zero where they hold nothing yet).

        Args:
            rule: names the counters.
            states: of the parameters; their counters become views of the vectors.
            device: of the weights.
        """
        self.values = {
            name: torch.tensor(
                [number(state.get(name)) for state in states],
                dtype=torch.float64,
                device=device,
            )
            for name in rule.counters
        }
        for index, state in enumerate(states):
            for name, vector in self.values.items():
                state[name] = vector[index]


def number(counter: Tensor | None) -> float:
    """A counter's value; 0 before it exists, and on the meta device."""
    return 0.0 if counter is None or counter.is_meta else float(counter)


def create(
    param: Tensor, layout: Layout, rule: Rule, storage: Storage, weights: Storage
) -> dict[str, Any]:
    """All of one parameter's tensors, zero; the counters follow with `Counters`.

    Args:
        param: as the optimizer sees it.
        layout: where its numbers lie.
        rule: names the lines.
        storage: of the lines.
        weights: storage of the weights; what it keeps beside the parameter is state.
    """
    state: dict[str, Any] = dict(weights.beside(WEIGHT, param))
    memory = layout.local(param.detach())
    for line in rule.lines:
        state.update(storage.allocate(line, param))
        if storage.group:
            scales = sum(num_groups(piece) for piece in layout.pieces)
            state[storage.keys(line)[1]] = torch.zeros(
                scales, dtype=SCALE_DTYPE, device=memory.device
            )
    dtype = torch.promote_types(param.dtype, torch.float32)
    for key, cut in zip(MOMENTS, (layout, *layout.others), strict=False):
        moments = torch.zeros(cut.num_blocks, dtype=dtype, device=memory.device)
        state[key] = cut.as_state(moments)
    return state
