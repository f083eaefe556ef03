"""`blocks="adam_mini"` against the published package: equal where it is right, and only there."""

from __future__ import annotations

import pytest
import torch
from architectures import CASES, GQA, WIDE, build, hf, resolve_all, summary
from torch import nn

from amsf_dist.blocks import Blocks, resolve

adam_mini = pytest.importorskip("adam_mini")


def llama(**sizes) -> nn.Module:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**GQA, **sizes}))


def upstream_step(model: nn.Module, **kwargs):
    """One step of the published optimizer: its second moments by parameter name."""
    optimizer = adam_mini.Adam_mini(model.named_parameters(), verbose=False, **kwargs)
    optimizer.world_size = 1
    optimizer.step()
    return {
        group["name"]: optimizer.state[group["params"][0]].get(
            "vmean", optimizer.state[group["params"][0]].get("v")
        )
        for group in optimizer.param_groups
    }


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_adam_mini_blocks_are_those_of_adam_mini(kv_heads):
    model = llama(num_key_value_heads=kv_heads, attention_bias=True)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    grads = {name: param.grad.clone() for name, param in model.named_parameters()}
    theirs = upstream_step(model, dim=64, n_heads=4, betas=(0.9, 0.0))
    for name, shape, blocks in resolve_all(model, "adam_mini"):
        assert blocks.note == ""
        ours = grads[name].reshape(-1, blocks.block_numel).square().mean(1)
        assert blocks.num_blocks(shape) == theirs[name].numel(), name
        torch.testing.assert_close(ours, theirs[name].reshape(-1))


def test_upstream_mistake_head_dim_is_not_hidden_size_over_heads():
    """Adam-mini's head has dim * dim / n_heads numbers: Qwen3 gets twice its heads."""
    config = hf.Qwen3Config(**WIDE)
    model = hf.Qwen3ForCausalLM(config)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    theirs = upstream_step(model, dim=64, n_heads=4)
    ours = summary(model, "adam_mini")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert theirs[name].numel() == 8
    assert ours[name] == "head 4"
    different = {name for name in ours if theirs[name].numel() != int(ours[name].split()[1])}
    assert different == {name, name.replace("q_proj", "k_proj")}


def test_upstream_mistakes_of_names_are_not_made():
    """Substrings: Phi-3's qkv_proj is a value, GPT-2's c_attn and torch's in_proj nothing."""
    weight = nn.Parameter(torch.zeros(2, 2))
    upstream = adam_mini.Adam_mini([("w", weight)], verbose=False)
    row_names = upstream.embd_names | upstream.output_names | upstream.wv_names
    row_names |= upstream.mlp_names | upstream.attn_proj_names

    def upstream_kind(name: str) -> str:  # the order of the branches in Adam_mini.step
        for words, kind in (
            (upstream.adam_block_names, "element"),
            (upstream.wqk_names, "head"),
            (row_names, "row"),
        ):
            if any(word in name.lower() for word in words):
                return kind
        return "tensor"

    mistakes = {
        "Phi3": ("model.layers.0.self_attn.qkv_proj.weight", "row", "head 8"),
        "GPT2": ("transformer.h.0.attn.c_attn.weight", "tensor", "head 12"),
        "Falcon": ("transformer.h.0.self_attention.dense.weight", "tensor", "row 64"),
        "T5": ("encoder.block.0.layer.0.SelfAttention.q.weight", "tensor", "head 4"),
    }
    for model, (name, theirs, ours) in mistakes.items():
        assert upstream_kind(name) == theirs
        assert summary(build(model), "adam_mini")[name] == ours
    # In Adam-mini this vector takes the branch for matrices and raises.
    assert upstream_kind("layers.0.mlp.norm.weight") == "row"
    assert resolve("adam_mini", "layers.0.mlp.norm.weight", (8,)) == Blocks("tensor", 8)
    assert upstream_kind("monkey.weight") == "head"
    assert resolve("adam_mini", "monkey.weight", (8, 4)).kind == "row"


@pytest.mark.parametrize("name", CASES)
def test_adam_mini_is_auto_but_for_norms(name):
    model = build(name)
    auto, adam_mini = summary(model), summary(model, "adam_mini")
    shapes = {name: param.shape for name, param in model.named_parameters(remove_duplicate=False)}
    for param in auto:
        if len(shapes[param]) < 2 and "bias" not in param:
            assert adam_mini[param] == "tensor 1"
        else:
            assert adam_mini[param] == auto[param]
