"""FSDP1 leaves ranks without a part of some parameters, or of all: they count and wait alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import relative_error, weights
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from amsf_dist import AMSF

RANKS = 4
STEPS = 6
RULES = [("tensor", "schedule_free"), ("element", "schedule_free"), ("tensor", "ema")]
# A rank whose own parameters get no gradients in a step does not see that the others do.
CASES = [(matrix, *rule) for matrix in (False, True) for rule in RULES]


class Little(nn.Module):
    """Three numbers that every step uses, and perhaps a matrix, in units of their own.

    Over four ranks the last one has nothing of the three, and a quarter of the matrix.
    """

    def __init__(self, matrix: bool) -> None:
        super().__init__()
        self.three = nn.Linear(1, 3, bias=False)
        self.matrix = nn.Linear(4, 16, bias=False) if matrix else None
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.linspace(0.1, 1.0, param.numel()).view(param.shape))

    def forward(self, uses_matrix: bool) -> Tensor:
        loss = self.three(torch.ones(2, 1)).square().sum()
        if self.matrix is not None and uses_matrix:
            loss = loss + self.matrix(torch.ones(2, 4)).square().sum()
        return loss


def build(matrix: bool, blocks: str, averaging: str, sharded: bool = True) -> tuple[Any, AMSF]:
    model: nn.Module = Little(matrix)
    if sharded:
        model = FullyShardedDataParallel(
            model,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        )
    return model, AMSF(model, lr=0.02, blocks=blocks, averaging=averaging, warmup_steps=3)


def trained(matrix: bool, blocks: str, averaging: str, sharded: bool) -> Any:
    """Weights, and the steps counted for every parameter with its numbers here."""
    model, optimizer = build(matrix, blocks, averaging, sharded)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(uses_matrix=step in (0, 4)).backward()
        optimizer.step()
    counts = [(p.numel(), float(optimizer.state[p]["step"])) for p in model.parameters()]
    if not sharded:
        return weights(model), counts
    # torch compares the counters of all ranks that have a part, and raises where they differ
    options = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    return weights(model, optimizer), counts, {key: float(s["step"]) for key, s in saved.items()}


@pytest.mark.parametrize(("matrix", "blocks", "averaging"), CASES)
def test_a_rank_without_a_part_counts_along(matrix: bool, blocks: str, averaging: str) -> None:
    expected, counted = trained(matrix, blocks, averaging, False)
    ranks = run_ranks(RANKS, trained, matrix, blocks, averaging, True)
    assert ranks[-1][1][0][0] == 0  # nothing of the three
    for values, counts, saved in ranks:
        error, name = relative_error(values, expected)
        assert error <= 1e-6, f"{name} differs by {error:.1e}"
        for (numel, count), (_, wanted) in zip(counts, counted, strict=True):
            # "ema" counts the steps of each parameter: of those that lie elsewhere nobody tells it
            assert count == wanted or (averaging == "ema" and not numel)
        assert sorted(saved.values()) == sorted(wanted for _, wanted in counted)


def step_in_eval_mode(gradients: bool) -> tuple[str, float]:
    model, optimizer = build(False, "tensor", "schedule_free")
    model(False).backward()
    optimizer.step()
    optimizer.eval()
    optimizer.zero_grad()
    if gradients:
        model(False).backward()
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)") as refusal:
        optimizer.step()
    optimizer.train()
    optimizer.zero_grad()
    model(False).backward()
    optimizer.step()  # all ranks are here
    return str(refusal.value), float(next(iter(optimizer.state.values()))["step"])


@pytest.mark.parametrize("gradients", [True, False])
def test_a_step_in_eval_mode_raises_on_every_rank(gradients: bool) -> None:
    told = run_ranks(RANKS, step_in_eval_mode, gradients)
    assert len(set(told)) == 1 and told[0][1] == 2.0
