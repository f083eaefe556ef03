"""cast_model: one 16-bit dtype, except where fp32 was asked for."""

from __future__ import annotations

import pytest
import torch
from layouts import fsdp2
from models import Shape, Transformer
from ranks import run_ranks
from torch import nn

from amsf_dist import AMSF, cast_model


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**heads, **size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_llama_with_norms_and_frequencies_in_fp32(dtype: torch.dtype) -> None:
    model, ids = llama(), torch.randint(0, 50, (2, 8))
    frequencies = model.model.rotary_emb.inv_freq.clone()
    full = model(input_ids=ids, labels=ids).loss
    assert cast_model(model, dtype, keep_fp32=("norm", "rotary")) is model
    for name, param in model.named_parameters():
        assert param.dtype == (torch.float32 if "norm" in name else dtype), name
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    out = model(input_ids=ids, labels=ids)
    assert out.logits.dtype == dtype
    assert float(out.loss) == pytest.approx(float(full), rel=1e-2)
    out.loss.backward()
    optimizer = AMSF(model)
    optimizer.step()
    kept = {model.get_parameter(n) for n, _ in model.named_parameters() if "norm" in n}
    for param in model.parameters():
        assert param.grad is not None and param.grad.dtype == param.dtype
        assert ("weight_error" in optimizer.state[param]) == (param not in kept)


def test_floating_inputs_are_cast_and_others_are_not() -> None:
    seen = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: torch.Tensor, *, mask: torch.Tensor, words: str) -> torch.Tensor:
            seen.extend([x.dtype, mask.dtype, words])
            return self.linear(x) * self.scale

    model = cast_model(Spy())
    out = model(torch.ones(1, 3), mask=torch.ones(1, dtype=torch.bool), words="as they are")
    assert seen == [torch.bfloat16, torch.bool, "as they are"] and out.dtype == torch.bfloat16
    assert model.count.dtype == torch.int64 and model.scale.dtype == torch.bfloat16


def test_a_class_or_a_pattern_may_be_kept() -> None:
    model = cast_model(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), keep_fp32=(nn.LayerNorm,))
    assert model[1].weight.dtype == torch.float32 and model[0].weight.dtype == torch.bfloat16
    assert model(torch.ones(1, 2)).dtype == torch.bfloat16
    model = cast_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), keep_fp32=("^1$",))
    assert model[1].weight.dtype == torch.float32


def test_what_matches_nothing_is_refused_before_anything_is_cast() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no module matches 'norm'; its classes are"):
        cast_model(model, keep_fp32=("norm",))
    with pytest.raises(ValueError, match="bfloat16 or torch.float16, got torch.float32"):
        cast_model(model, torch.float32)
    assert model[0].weight.dtype == torch.float32


def under_fsdp2() -> float:
    shape = Shape()
    model = fsdp2(cast_model(Transformer(shape, dtype=torch.float32)))
    optimizer = AMSF(model, state_storage="bf16")
    tokens = torch.randint(0, shape.vocab, (2, 9), generator=torch.Generator().manual_seed(0))
    model(tokens).float().logsumexp(-1).mean().backward()
    optimizer.step()
    memory = optimizer.memory()
    assert memory["error_bits"] * 2 == memory["weights"] == memory["gap"]
    return float(memory["total"])


def test_before_fully_shard() -> None:
    assert all(total > 0 for total in run_ranks(2, under_fsdp2))
