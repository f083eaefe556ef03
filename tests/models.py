"""The models of the tests, in plain torch, and data that is the same on every machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Little",
    "Shape",
    "Transformer",
    "assert_same_bits",
    "backward",
    "batch",
    "everything",
    "fit",
    "largest_difference",
]


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped-query attention; `head_dim` need not be dim / heads."""

    vocab: int = 24
    dim: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    hidden: int = 40
    layers: int = 1


class Attention(nn.Module):
    """Causal grouped-query attention, biases everywhere."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = shape.heads, shape.kv_heads
        self.head_dim = shape.head_dim
        self.q_proj = nn.Linear(shape.dim, shape.heads * shape.head_dim)
        self.k_proj = nn.Linear(shape.dim, shape.kv_heads * shape.head_dim)
        self.v_proj = nn.Linear(shape.dim, shape.kv_heads * shape.head_dim)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.dim)

    def forward(self, x: Tensor) -> Tensor:
        batch_size, length, _ = x.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(batch_size, length, -1, self.head_dim).transpose(1, 2)

        repeat = self.num_heads // self.num_key_value_heads
        query = heads(self.q_proj(x))
        key = heads(self.k_proj(x)).repeat_interleave(repeat, dim=1)
        value = heads(self.v_proj(x)).repeat_interleave(repeat, dim=1)
        scores = query @ key.transpose(-1, -2) / self.head_dim**0.5
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(mask, float("-inf")).softmax(-1) @ value
        return self.o_proj(mixed.transpose(1, 2).reshape(batch_size, length, -1))


class GatedMLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.dim, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.dim, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.dim, eps=1e-6)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.dim, eps=1e-6)
        self.mlp = GatedMLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.dim)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.dim, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Transformer(nn.Module):
    """A small Llama in all but the biases; the names are those of transformers.

    The output projection is the embedding (tied), and one buffer rides along.
    """

    def __init__(
        self, shape: Shape | None = None, *, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> None:
        super().__init__()
        self.shape = shape or Shape()
        self.model = Decoder(self.shape)
        self.lm_head = nn.Linear(self.shape.dim, self.shape.vocab, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("temperature", torch.ones(()))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, param in self.named_parameters():
                noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
                param.copy_(0.1 * noise + float(name.endswith("norm.weight")))
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.model(tokens)) / self.temperature

    def loss(self, step: int) -> Tensor:
        tokens = batch(step, self.shape.vocab, device=self.lm_head.weight.device)
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Little(nn.Module):
    """One parameter of each kind, for tests in which the network does not matter.

    Args:
        dtype: of the parameters.
        seed: of their values.
        rows: of the embedding.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0, rows: int = 8) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(rows, 6)
        self.norm = nn.LayerNorm(6)
        self.up_proj = nn.Linear(6, 10)
        self.register_buffer("counted", torch.tensor(3))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.up_proj(self.norm(self.embed_tokens(tokens)))

    def loss(self, step: int) -> Tensor:
        tokens = batch(step, self.embed_tokens.num_embeddings)
        tokens = tokens.to(self.norm.weight.device)
        target = torch.sin(torch.arange(10, device=tokens.device) + step)
        return (self(tokens).float() - target).square().mean()


def batch(step: int, vocab: int, *, size: int = 4, length: int = 13, device: Any = None) -> Tensor:
    """Token rows of step `step`: counting in threes, a tenth of the tokens replaced by noise."""
    generator = torch.Generator().manual_seed(1000 + step)
    first = torch.randint(vocab, (size, 1), generator=generator)
    tokens = (first + 3 * torch.arange(length)) % vocab
    noise = torch.randint(vocab, tokens.shape, generator=generator)
    replaced = torch.rand(tokens.shape, generator=generator) < 0.1
    return torch.where(replaced, noise, tokens).to(device)


def backward(model: Any, step: int) -> Tensor:
    """Fresh gradients of step `step`; returns the loss."""
    model.zero_grad(set_to_none=True)
    loss = model.loss(step)
    loss.backward()
    return loss.detach()


def fit(
    model: Any,
    optimizer: Any,
    steps: int | Iterable[int],
    *,
    scheduler: Any = None,
    before_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train, and return the losses.

    Args:
        model: has `loss(step)`.
        optimizer: of its parameters.
        steps: how many, or which.
        scheduler: stepped after every step.
        before_step: called with the step between backward and step, to edit the gradients.
    """
    losses = []
    for step in range(steps) if isinstance(steps, int) else steps:
        losses.append(float(backward(model, step)))
        if before_step is not None:
            before_step(step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return losses


def largest_difference(
    ours: Any, theirs: Any, *, leave_out: tuple[str, ...] = ()
) -> tuple[float, str]:
    """(largest error, name of its tensor) between two models or name -> tensor mappings.

    The error of a number is |ours - theirs| divided by the largest |theirs| of its tensor.

    Args:
        ours: module or mapping.
        theirs: module or mapping with the same names.
        leave_out: ends of names that are not compared.
    """
    mine, other = dict(_named(ours)), dict(_named(theirs))
    assert mine.keys() == other.keys()
    worst = (0.0, "nothing differs")
    for name, value in mine.items():
        if name.endswith(leave_out) and leave_out:
            continue
        a, b = value.double(), other[name].double()
        assert a.shape == b.shape, name
        if a.numel():
            error = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-300)
            assert error == error, f"{name} is not a number"
            worst = max(worst, (error, name))
    return worst


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of all that a step may change: weights, state and group options."""
    saved = optimizer.state_dict()
    return copy.deepcopy(
        {
            "weights": {name: param.detach() for name, param in model.named_parameters()},
            "state": saved["state"],
            "groups": saved["param_groups"],
        }
    )


def assert_same_bits(ours: Any, theirs: Any, where: str = "") -> None:
    """Two nests of modules, mappings, sequences, tensors and values are the same, bit for bit."""
    if isinstance(ours, nn.Module) and isinstance(theirs, nn.Module):
        ours, theirs = dict(_named(ours)), dict(_named(theirs))
    if isinstance(ours, Mapping):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            assert_same_bits(value, theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (value, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same_bits(value, other, f"{where}[{index}]")
    elif isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, where
        differs = ours.detach() != theirs.detach()
        assert not differs.any(), f"{where}: {int(differs.sum())} of {differs.numel()} numbers"
    else:
        assert ours == theirs, where


def _named(source: Any) -> Iterator[tuple[str, Tensor]]:
    items = source.named_parameters() if isinstance(source, nn.Module) else source.items()
    return ((name, value.detach()) for name, value in items)
