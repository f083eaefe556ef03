"""`blocks="factored"`: the formulas of docs/algorithm.md, (12) to (14), in plain fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, OPTIONS, SHAPES, loss_of, moments, relative_error, train, weights
from models import Shape, Transformer, assert_same_bits, fit, largest_difference
from ranks import run_ranks
from reference import AdamMiniReference, ScheduleFreeReference
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers.pytorch_utils import Conv1D

from amsf_dist import AMSF, explain
from amsf_dist.checkpoint import export_state_dict, import_state_dict

NOISE = "k_proj.bias"  # no true gradient, see tests/equal/test_sharding.py


class _Factored:
    """Denominators of matrices from three averages: over rows, over columns, over everything."""

    def _denominator(self: Any, name: str, grad: Tensor, steps: int) -> Tensor:
        _, beta2 = self.hyper["betas"]
        eps, correction = self.hyper["eps"], 1 - beta2**steps
        matrix = self.as_matrix(name, grad)
        if matrix is None:
            return super()._denominator(name, grad, steps)
        rows, columns, mean = self.factors.setdefault(name, (0.0, 0.0, 0.0))
        squared = matrix.square()
        rows = beta2 * rows + (1 - beta2) * squared.mean(1)
        columns = beta2 * columns + (1 - beta2) * squared.mean(0)
        mean = beta2 * mean + (1 - beta2) * squared.mean()
        self.factors[name] = rows, columns, mean
        roots = [(part / correction).sqrt() + eps for part in (rows, columns, mean)]
        denominator = torch.outer(roots[0], roots[1]) / roots[2]
        return self.as_stored(name, denominator, grad)

    def as_matrix(self, name: str, grad: Tensor) -> Tensor | None:
        return grad if grad.dim() == 2 else None

    def as_stored(self, name: str, matrix: Tensor, grad: Tensor) -> Tensor:
        return matrix


class FactoredScheduleFree(_Factored, ScheduleFreeReference):
    def __init__(self, *args: Any, **hyper: Any) -> None:
        super().__init__(*args, **hyper)
        self.factors: dict[str, Any] = {}


class FactoredEma(_Factored, AdamMiniReference):
    def __init__(self, *args: Any, **hyper: Any) -> None:
        super().__init__(*args, **hyper)
        self.factors: dict[str, Any] = {}


REFERENCES = {"schedule_free": FactoredScheduleFree, "ema": FactoredEma}
HYPER: dict[str, Any] = {"lr": 5e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("averaging", REFERENCES)
def test_a_transformer_follows_the_formulas(averaging: str) -> None:
    model, theirs = Transformer(), Transformer()
    optimizer = AMSF(model, blocks="factored", averaging=averaging, **HYPER)
    fit(model, optimizer, 40)
    reference = REFERENCES[averaging](theirs.named_parameters(), **HYPER)
    fit(theirs, reference, 40)
    error, name = largest_difference(model, theirs, leave_out=(NOISE,))
    assert error <= 1e-12, f"{name} differs by {error:.1e}"
    for name, param in model.named_parameters():
        if param.dim() == 2:
            state = optimizer.state[param]
            keys = ("exp_avg_sq", "exp_avg_sq_col", "exp_avg_sq_mean")
            for key, expected in zip(keys, reference.factors[name], strict=True):
                torch.testing.assert_close(
                    state[key].flatten(), expected.flatten(), rtol=1e-12, atol=0
                )


class Shapes(nn.Module):
    """A weight of every shape that has rows and columns, by a made-up loss."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (2, 5))
        self.up = nn.ConvTranspose2d(3, 4, 2)
        self.c_fc = Conv1D(7, 6)
        self.experts = nn.ParameterDict({"gate_up_proj": nn.Parameter(torch.zeros(3, 4, 5))})
        self.one_row, self.one_column = nn.Linear(6, 1), nn.Linear(1, 6)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))
        self.double()

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        total = torch.zeros(())
        for param in self.parameters():
            data = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            total = total + (param * data).sin().sum()
        return total


# name -> dims of its weight that are rows, and those that are columns
ROWS_AND_COLUMNS = {
    "conv.weight": ((0,), (1, 2, 3)),
    "up.weight": ((1,), (0, 2, 3)),
    "c_fc.weight": ((1,), (0,)),
    "experts.gate_up_proj": ((0, 1), (2,)),
}


class FactoredShapes(FactoredEma):
    def as_matrix(self, name: str, grad: Tensor) -> Tensor | None:
        if name not in ROWS_AND_COLUMNS:
            return None
        rows, columns = ROWS_AND_COLUMNS[name]
        count = grad.shape[rows[0]] if len(rows) == 1 else grad.shape[0] * grad.shape[1]
        return grad.permute(*rows, *columns).reshape(count, -1)

    def as_stored(self, name: str, matrix: Tensor, grad: Tensor) -> Tensor:
        rows, columns = ROWS_AND_COLUMNS[name]
        order = (*rows, *columns)
        line = matrix.reshape([grad.shape[dim] for dim in order])
        return line.permute([order.index(dim) for dim in range(len(order))])


def test_convolutions_experts_and_transposed_weights_are_matrices() -> None:
    model, theirs = Shapes(), Shapes()
    optimizer = AMSF(model, blocks="factored", averaging="ema", **HYPER)
    fit(model, optimizer, 20)
    fit(theirs, FactoredShapes(theirs.named_parameters(), **HYPER), 20)
    error, name = largest_difference(model, theirs)
    assert error <= 1e-12, f"{name} differs by {error:.1e}"
    kinds = {row.name: row.kind for row in optimizer.explain().rows}
    assert {name for name, kind in kinds.items() if kind == "factored"} == {*ROWS_AND_COLUMNS}
    assert kinds["one_row.weight"] == kinds["one_column.weight"] == "element"


@pytest.mark.parametrize("averaging", REFERENCES)
def test_squares_of_rank_one_give_the_second_moment_of_every_element(averaging: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, plain = (nn.Parameter(torch.ones(6, 9, dtype=torch.float64)) for _ in range(2))
    options = {**HYPER, "averaging": averaging, "eps": 0.0}
    factored = AMSF([("a.weight", ours)], blocks="factored", **options)
    element = AMSF([("a.weight", plain)], blocks="element", **options)
    left, right = (10.0 ** torch.randn(n, generator=generator).double() for n in (6, 9))
    for _ in range(10):
        # one outer product times a number of the step, so that its average is one too
        sign = torch.randint(0, 2, (6, 9), generator=generator) * 2.0 - 1.0
        grad = torch.outer(left, right) * sign * torch.rand((), generator=generator)
        ours.grad, plain.grad = grad.clone(), grad.clone()
        factored.step()
        element.step()
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("zero", ["row", "column", "all"])
def test_where_nothing_has_a_gradient_weights_only_decay(zero: str, eps: float) -> None:
    weight = nn.Parameter(torch.ones(5, 4))
    options = {"lr": 0.1, "weight_decay": 0.5, "averaging": "ema", "eps": eps}
    optimizer = AMSF([("a.weight", weight)], blocks="factored", **options)
    idle = {"row": (2, slice(None)), "column": (slice(None), 2), "all": (slice(None),)}[zero]
    for step in range(3):
        weight.grad = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        weight.grad[idle] = 0.0
        optimizer.step()
    assert weight.isfinite().all()
    torch.testing.assert_close(weight[idle], torch.full_like(weight[idle], 0.95**3))
    assert zero == "all" or not torch.allclose(weight, torch.full_like(weight, 0.95**3))


def test_a_transposed_weight_moves_as_the_weight_does() -> None:
    """Which dim of a matrix counts as its rows makes no difference."""
    ours, theirs = nn.Parameter(torch.ones(3, 8).double()), nn.Parameter(torch.ones(8, 3).double())
    optimizers = [AMSF([("a", p)], blocks="factored", **HYPER) for p in (ours, theirs)]
    for step in range(5):
        grad = torch.randn(3, 8, generator=torch.Generator().manual_seed(step)).double()
        ours.grad, theirs.grad = grad, grad.T.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs.T, rtol=1e-13, atol=0)


def test_rules_may_factor_some_weights() -> None:
    model = Transformer()
    rules = [{"pattern": "mlp", "kind": "factored"}]
    kinds = {row.name: row.kind for row in explain(model, blocks=rules).rows}
    assert {name for name, kind in kinds.items() if kind == "factored"} == {
        f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    }
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "head"
    optimizer = AMSF(model, blocks=rules, **HYPER)
    assert fit(model, optimizer, 5)[-1] < fit(Transformer(), optimizer, [0])[0]


def test_explain_and_memory_count_every_vector() -> None:
    model = Transformer(Shape(vocab=24, dim=32, hidden=40), dtype=torch.float32)
    optimizer = AMSF(model, blocks="factored")
    up = next(row for row in optimizer.explain().rows if row.name.endswith("up_proj.weight"))
    assert up.blocks == 40 + 32 + 1
    assert up.state_bytes == 4 * (40 * 32 + 40 + 32 + 1)
    rows, memory = optimizer.explain().rows, optimizer.memory()
    assert sum(row.state_bytes for row in rows) == memory["gap"] + memory["v"]
    assert explain(model, blocks="factored") == optimizer.explain()
    cut = {row.name: row.cut_blocks for row in explain(model, mesh=4, blocks="factored").rows}
    assert cut["model.layers.0.mlp.up_proj.weight"] == 32 + 1  # columns and the mean, no rows


def test_adamw_comes_in_as_means_and_goes_out_as_products() -> None:
    model = Transformer()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fit(model, adamw, 5)
    optimizer = AMSF(model, blocks="factored", averaging="ema", lr=1e-3, betas=(0.9, 0.999))
    import_state_dict(optimizer, adamw.state_dict())
    exported = export_state_dict(optimizer)["state"]
    for index, param in enumerate(model.parameters()):
        v, out = adamw.state[param]["exp_avg_sq"], exported[index]["exp_avg_sq"]
        if param.dim() == 1:
            assert torch.equal(out, v)
            continue
        state, means = optimizer.state[param], (v.mean(1), v.mean(0), v.mean())
        keys = ("exp_avg_sq", "exp_avg_sq_col", "exp_avg_sq_mean")
        for key, expected in zip(keys, means, strict=True):
            torch.testing.assert_close(state[key].flatten(), expected.flatten(), rtol=1e-12, atol=0)
        torch.testing.assert_close(out, torch.outer(*means[:2]) / means[2], rtol=1e-12, atol=0)


def test_a_state_without_columns_is_refused_and_rows_remain_loadable() -> None:
    model = Transformer()
    rows, factored = (AMSF(model, blocks=blocks) for blocks in ("row", "factored"))
    fit(model, factored, 2)
    before = copy.deepcopy(factored.state_dict())
    with pytest.raises(ValueError, match=r"no 'exp_avg_sq_col'.*another blocks="):
        factored.load_state_dict(rows.state_dict())
    assert_same_bits(factored.state_dict(), before)
    rows.load_state_dict(factored.state_dict())
    for param in model.parameters():
        ours, theirs = rows.state[param], factored.state[param]
        assert torch.equal(ours["exp_avg_sq"], theirs["exp_avg_sq"])


# Under sharding; the table of tests/equal/test_sharding.py has a row of "factored" in it ----------


def given_gradients(layout: str | None) -> Any:
    """Moments after three steps whose gradients do not depend on the number of ranks."""
    model = Transformer(SHAPES["uneven"], dtype=torch.float32)
    model = LAYOUTS[layout].wrap(model) if layout else model
    optimizer = AMSF(model, blocks="factored", deterministic=True, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator)
            grad *= torch.logspace(-6, 6, grad.numel()).view(grad.shape)
            if layout:
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        optimizer.step()
    return moments(model, optimizer)


@pytest.mark.parametrize(("layout", "world_size"), [("fsdp2", 3), ("fsdp2 Shard(1)", 2)])
def test_deterministic_moments_have_the_same_bits(layout: str, world_size: int) -> None:
    expected = given_gradients(None)
    for ours in run_ranks(world_size, given_gradients, layout):
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


def by_placement(dim: int | None) -> Any:
    """Weights of every shape cut along one dim, with gradients that are the same everywhere."""
    model = Shapes()
    if dim is not None:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for module in model.modules():
            for name, param in list(module.named_parameters(recurse=False)):
                place = [Shard(dim) if dim < param.dim() else Replicate()]
                sharded = nn.Parameter(distribute_tensor(param.detach(), mesh, place))
                if isinstance(module, nn.ParameterDict):
                    module[name] = sharded
                else:
                    setattr(module, name, sharded)
    optimizer = AMSF(model, blocks="factored", **HYPER)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            if dim is not None:
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        optimizer.step()
    return weights(model), moments(model, optimizer)


def along_every_dim() -> Any:
    return [by_placement(dim) for dim in range(4)]


def test_any_dim_of_any_weight_may_be_cut() -> None:
    expected = by_placement(None)
    for found in run_ranks(3, along_every_dim):
        for dim, ours in enumerate(found):
            for value, theirs in zip(ours, expected, strict=True):
                error, name = relative_error(value, theirs)
                assert error <= 1e-13, f"Shard({dim}): {name} differs by {error:.1e}"


def one_bad_number() -> Any:
    """One layer on all ranks, the rest in pairs that agree on nothing: no verdict for all."""
    model = Transformer(SHAPES["even"], dtype=torch.float32)
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "pair"))
    fully_shard(model.model.layers[0].mlp, mesh=init_device_mesh("cpu", (4,)))
    fully_shard(model, mesh=pairs["pair"])
    rules = [{"pattern": "up_proj", "kind": "factored"}, {"pattern": ".*", "kind": "element"}]
    optimizer = AMSF(model, blocks=rules, **OPTIONS)
    train(model, optimizer, SHAPES["even"].vocab, range(2))
    assert not optimizer._ready().units[0].sums.everyone_knows
    before = weights(model), moments(model, optimizer)
    loss_of(model, SHAPES["even"].vocab, 2, torch.distributed.get_rank(), 4).backward()
    up = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    if torch.distributed.get_rank() == 1:
        up.grad.to_local()[0, 3] = torch.nan
    optimizer.step()
    return before, (weights(model), moments(model, optimizer))


def test_one_bad_number_leaves_its_whole_matrix_as_it_is_on_every_rank() -> None:
    for before, after in run_ranks(4, one_bad_number):
        for was, found in zip(before, after, strict=True):
            for name, value in found.items():
                assert value.isfinite().all()
                assert torch.equal(value, was[name]) == ("up_proj" in name), name
