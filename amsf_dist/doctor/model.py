"""The patient: a decoder small enough for seconds, with every trait that has broken optimizers.

Grouped-query attention whose heads are not width / number of heads wide; output tied to the
embedding; a frozen parameter; biases; two sorts of norm; and sizes that no number of ranks divides,
so that rows and heads are cut wherever a wrapper cuts. No bias for keys: under softmax its true
gradient is zero, and an Adam turns the rounding noise there into full-size steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Layer", "TinyModel", "batches", "loss_of"]

_VOCAB, _DIM, _HEADS, _HEAD_DIM, _HIDDEN, _LENGTH = 29, 12, 3, 5, 17, 11
_ROWS = 2  # of a micro-batch


class _Attention(nn.Module):
    """Three query heads, one of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = _HEADS, 1, _HEAD_DIM
        self.q_proj = nn.Linear(_DIM, _HEADS * _HEAD_DIM)
        self.k_proj = nn.Linear(_DIM, _HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(_DIM, _HEAD_DIM)
        self.o_proj = nn.Linear(_HEADS * _HEAD_DIM, _DIM)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        query = self.q_proj(x).view(rows, length, _HEADS, _HEAD_DIM).transpose(1, 2)
        key, value = self.k_proj(x).unsqueeze(1), self.v_proj(x).unsqueeze(1)
        scores = query @ key.transpose(-1, -2) / _HEAD_DIM**0.5
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ value
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))
        return out


class _MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(_DIM, _HIDDEN, bias=False)
        self.up_proj = nn.Linear(_DIM, _HIDDEN, bias=False)
        self.down_proj = nn.Linear(_HIDDEN, _DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """What FSDP wraps in a unit of its own."""

    def __init__(self) -> None:
        """Weights as torch makes them; `TinyModel` writes its own."""
        super().__init__()
        self.input_layernorm = nn.RMSNorm(_DIM, eps=1e-6)
        self.self_attn = _Attention()
        self.post_attention_layernorm = nn.RMSNorm(_DIM, eps=1e-6)
        self.mlp = _MLP()

    def forward(self, x: Tensor) -> Tensor:
        """[rows, length, width] in and out."""
        x = x + self.self_attn(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class TinyModel(nn.Module):
    """A Llama in all but size and biases.

    Args:
        seed: of the weights.
        frozen: whether one parameter is not trained.
    """

    # what accelerate looks for in a model of transformers
    _no_split_modules = ("Layer",)

    def __init__(self, seed: int = 0, frozen: bool = True) -> None:
        """See the class."""
        super().__init__()
        self.config = SimpleNamespace(hidden_size=_DIM)
        self.embed_tokens = nn.Embedding(_VOCAB, _DIM)
        self.position = nn.Embedding(_LENGTH, _DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.LayerNorm(_DIM, eps=1e-6)
        self.lm_head = nn.Linear(_DIM, _VOCAB, bias=False)
        self.tie_weights()
        self.position.weight.requires_grad_(not frozen)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, param in self.named_parameters():
                noise = torch.randn(param.shape, generator=generator)
                param.copy_(0.2 * noise + 0.5 * float(name.endswith("norm.weight")))

    def tie_weights(self) -> None:
        """Make the output projection the embedding."""
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """[rows, length] tokens -> [rows, length, vocabulary] logits."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embed_tokens(tokens) + self.position(places)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


def batches(step: int, parts: int, device: torch.device) -> Sequence[Tensor]:
    """The global batch of a step, the same on every rank, as `parts` equal micro-batches."""
    generator = torch.Generator().manual_seed(1000 + step)
    first = torch.randint(_VOCAB, (_ROWS * parts, 1), generator=generator)
    tokens = (first + 3 * torch.arange(_LENGTH + 1)) % _VOCAB
    noise = torch.randint(_VOCAB, tokens.shape, generator=generator)
    replaced = torch.rand(tokens.shape, generator=generator) < 0.2
    return torch.where(replaced, noise, tokens).to(device).chunk(parts)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss of one micro-batch; in fp32, or fp64 for an fp64 model."""
    logits = model(tokens[:, :-1])
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
