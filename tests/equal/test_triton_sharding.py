"""The Triton kernels equal the reference on shards too: cut blocks, cut groups, boxes of columns.

In the interpreter, on gloo; gradients and roots as in test_triton.py.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import assert_same_bits
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from amsf_dist import AMSF

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU benchmarks/gpu_suite.py checks"
)

SHAPES = ((6, 64), (5, 128), (64,), (7,), (4, 70), (9, 4))  # the last: place 20, 16 numbers
CASES: list[tuple[int, int, dict[str, Any], list[str]]] = [
    # ranks, sharded dim, options, kernels
    (2, 0, {"blocks": "row"}, ["TritonKernel"]),
    (2, 0, {"blocks": "tensor"}, ["TritonKernel"]),
    (3, 0, {"blocks": "auto", "max_norm": 0.5}, ["TritonKernel"]),
    (2, 1, {"blocks": "row"}, ["TritonKernel"]),
    (2, 1, {"blocks": "row", "weight_storage": "stochastic"}, ["TritonKernel"]),  # few rows
    (2, 0, {"blocks": "row", "state_storage": "int8"}, ["Reference", "TritonKernel"]),
    (2, 0, {"blocks": "row", "weight_storage": "stochastic"}, ["TritonKernel"]),
    (2, 0, {"blocks": "factored", "clip": "block"}, ["TritonKernel"]),
    (2, 1, {"blocks": "factored"}, ["Reference", "TritonKernel"]),  # parts of rows
    (3, 0, {"blocks": "factored", "state_storage": "int8"}, ["Reference", "TritonKernel"]),
    (3, 0, {"blocks": "tensor", "state_storage": "int8"}, ["Reference", "TritonKernel"]),
]


def every(cases: list[tuple[int, dict[str, Any]]]) -> list[Any]:
    """In one set of processes: they cost more than the steps."""
    from amsf_dist.kernels.triton import stepper
    from amsf_dist.kernels.triton.tables import Programs

    root = Tensor.sqrt
    Tensor.sqrt = lambda self: root(self.double()).to(self.dtype)  # type: ignore[method-assign]
    Tensor.sqrt_ = lambda self: self.copy_(self.sqrt())  # type: ignore[method-assign]
    stepper.TritonKernel.programs = Programs(
        groups=4, tiles=2, columns=128, longest=300, item=256, blocks=8
    )
    return [sharded(*case) for case in cases]


def sharded(dim: int, options: dict[str, Any]) -> list[Any]:
    """[(kernels, weights and state on this rank, skipped steps)] of the reference, of Triton."""
    found = []
    for name in ("reference", "triton"):
        os.environ["AMSF_KERNEL"] = name
        model = nn.Module()
        generator = torch.Generator().manual_seed(0)
        for index, shape in enumerate(SHAPES):
            values = torch.randn(shape, generator=generator).bfloat16()
            model.register_parameter(f"p{index}", nn.Parameter(values))
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(min(dim, p.dim() - 1)))
        optimizer = AMSF(model, lr=0.02, weight_decay=0.1, **options)
        for step in range(3):
            for param in model.parameters():
                drawn = torch.randint(-15, 16, param.shape, generator=generator) / 64
                if step == 1:
                    drawn.view(-1)[3] = float("nan")
                param.grad = distribute_tensor(
                    drawn.bfloat16(), param.device_mesh, param.placements, src_data_rank=None
                )
            optimizer.step()
        lanes = [lane for unit in optimizer._ready().units for lane in unit.lanes]
        kernels = sorted({type(one).__name__ for lane in lanes for one in lane.kernels})
        state = [[param, *optimizer.state[param].values()] for param in model.parameters()]
        local = [
            [getattr(value, "_local_tensor", value).detach().clone() for value in values]
            for values in state
        ]
        found.append((kernels, local, optimizer.skipped_steps))
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_step_as_with_the_reference(ranks: int) -> None:
    cases = [case for case in CASES if case[0] == ranks]
    for rank in run_ranks(ranks, every, [case[1:3] for case in cases]):
        for (_, _, options, kernels), (theirs, ours) in zip(cases, rank, strict=True):
            assert theirs[0] == ["Reference"]
            assert ours[0] == kernels, options
            assert ours[2] == theirs[2]
            for some, others in zip(ours[1], theirs[1], strict=True):
                for one, other in zip(some, others, strict=True):
                    if "max_norm" in options:  # norms are summed in another order
                        assert torch.allclose(one.double(), other.double(), rtol=1e-2, atol=1e-6)
                    else:
                        assert_same_bits(one, other, str(options))
