"""Tiny models of the architectures people train, and the blocks each parameter should have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from amsf_dist.architecture import read_architecture
from amsf_dist.blocks import Blocks, resolve

hf = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 50,
}
GQA = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
WIDE = {**GQA, "head_dim": 32}  # 4 heads of 32 on a hidden size of 64
GPT2 = {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 50, "n_positions": 32}
MLA = {
    **{**SIZES, "num_hidden_layers": 2},
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 20,
    "first_k_dense_replace": 1,
}
WHISPER = {
    "vocab_size": 50,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "pad_token_id": 0,
}

# Parameters with two or more dims: pattern -> "kind blocks". Vectors are elements everywhere.
LLAMA = {
    "embed_tokens|lm_head": "row 50",
    "q_proj": "head 4",
    "k_proj": "head 2",
    "v_proj": "row 32",
    "o_proj|down_proj": "row 64",
    "gate_proj|up_proj": "row 96",
}
LLAMA_WIDE = {**LLAMA, "v_proj": "row 64"}
ROUTED = {"mlp.gate.weight|router": "row 3"}
MOE_ATTENTION = {k: v for k, v in LLAMA.items() if "down" not in k and "gate" not in k} | ROUTED
CASES = {
    "Llama": ({**GQA}, LLAMA),
    "Mistral": ({**GQA}, LLAMA),
    "Qwen2": ({**GQA}, LLAMA),
    "Qwen3": (WIDE, LLAMA_WIDE),
    "Gemma": (WIDE, LLAMA_WIDE),
    "Phi3": (
        GQA,
        {
            "embed_tokens|lm_head": "row 50",
            "qkv_proj": "head 8",
            "o_proj|down_proj": "row 64",
            "gate_up_proj": "row 192",
        },
    ),
    "Mixtral": (
        {**GQA, "num_local_experts": 3},
        {
            **MOE_ATTENTION,
            "o_proj": "row 64",
            "experts.gate_up_proj": "row 576",
            "experts.down_proj": "row 192",
        },
    ),
    "Qwen2Moe": (
        {
            **GQA,
            "num_experts": 3,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 48,
        },
        {
            **MOE_ATTENTION,
            "o_proj": "row 64",
            "experts.gate_up_proj": "row 288",
            "experts.down_proj": "row 192",
            r"shared_expert\.(gate|up)_proj": "row 48",
            r"shared_expert\.down_proj": "row 64",
            "shared_expert_gate": "row 1",
        },
    ),
    "Qwen3Moe": (
        {**WIDE, "num_experts": 3, "moe_intermediate_size": 48, "decoder_sparse_step": 1},
        {
            **MOE_ATTENTION,
            "v_proj": "row 64",
            "o_proj": "row 64",
            "experts.gate_up_proj": "row 288",
            "experts.down_proj": "row 192",
        },
    ),
    "GptOss": (
        {**WIDE, "num_local_experts": 3},
        {
            **MOE_ATTENTION,
            "v_proj": "row 64",
            "o_proj": "row 64",
            r"gate_up_proj$": "row 576",  # stored [experts, in, out]
            r"down_proj$": "row 192",
            r"gate_up_proj_bias": "element 576",
            r"down_proj_bias": "element 192",
        },
    ),
    "Llama4Text": (
        {**WIDE, "num_local_experts": 3, "intermediate_size_mlp": 96},
        {
            **MOE_ATTENTION,
            "v_proj": "row 64",
            "o_proj": "row 64",
            r"experts\.gate_up_proj": "row 576",  # stored [experts, in, out]
            r"experts\.down_proj": "row 192",
            r"shared_expert\.(gate|up)_proj": "row 96",
            r"shared_expert\.down_proj": "row 64",
        },
    ),
    "DeepseekV3": (
        MLA,
        {
            "embed_tokens|lm_head": "row 50",
            "q_a_proj|kv_a_proj": "row 24",
            "q_b_proj": "head 4",  # 24 = 16 + 8 rows per head; config.head_dim says 8
            "kv_b_proj": "row 144",
            "o_proj": "row 64",
            r"mlp\.experts\.gate_up_proj": "row 768",
            r"mlp\.experts\.down_proj": "row 512",
            r"mlp\.(gate|up)_proj": "row 96",
            r"shared_experts\.(gate|up)_proj": "row 48",
            r"(mlp|shared_experts)\.down_proj": "row 64",
            r"mlp\.gate\.weight": "row 8",
        },
    ),
    "GPT2": (
        GPT2,
        {
            "wte|lm_head": "row 50",
            "wpe": "row 32",
            "c_attn": "head 12",
            r"attn\.c_proj|mlp\.c_proj": "row 64",
            "c_fc": "row 256",
        },
    ),
    "GPTNeoX": (
        SIZES,
        {
            "embed_in|lm_head": "row 50",
            "query_key_value": "head 12",
            "attention.dense|4h_to_h": "row 64",
            "h_to_4h": "row 96",
        },
    ),
    "Falcon": (
        {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2},
        {
            "word_embeddings|lm_head": "row 50",
            "query_key_value": "head 8",
            "attention.dense|4h_to_h": "row 64",
            "h_to_4h": "row 256",
        },
    ),
    "Bloom": (
        {"vocab_size": 50, "hidden_size": 64, "n_layer": 1, "n_head": 4},
        {
            "word_embeddings|lm_head": "row 50",
            "query_key_value": "head 12",
            "attention.dense|4h_to_h": "row 64",
            "h_to_4h": "row 256",
        },
    ),
    "OPT": (
        {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 32},
        {
            "embed_tokens|lm_head": "row 50",
            "embed_positions": "row 2050",
            "project_out": "row 32",
            "project_in|v_proj|out_proj|fc2": "row 64",
            "q_proj|k_proj": "head 4",
            "fc1": "row 96",
        },
    ),
    "Bert": (
        SIZES,
        {
            "word_embeddings|predictions.decoder": "row 50",
            "position_embeddings": "row 512",
            "token_type": "row 2",
            r"self\.(query|key)": "head 4",
            "value|output.dense|transform.dense": "row 64",
            "intermediate.dense": "row 96",
        },
    ),
    "T5": (
        {
            "vocab_size": 50,
            "d_model": 64,
            "d_kv": 32,
            "d_ff": 96,
            "num_layers": 1,
            "num_heads": 4,
        },
        {
            "shared|embed_tokens": "row 50",
            r"Attention\.(q|k)\.": "head 4",  # 128 rows on a hidden size of 64
            r"Attention\.v\.": "row 128",
            r"Attention\.o\.|wo": "row 64",
            "relative_attention_bias": "element 128",
            "wi": "row 96",
        },
    ),
    "Whisper": (
        WHISPER,
        {
            "conv": "row 64",
            "encoder.embed_positions": "row 1500",
            "decoder.embed_positions": "row 448",
            "embed_tokens": "row 50",
            "q_proj|k_proj": "head 4",
            "v_proj|out_proj|fc2": "row 64",
            "fc1": "row 96",
        },
    ),
    "ViT": (
        {**{k: v for k, v in SIZES.items() if k != "vocab_size"}, "image_size": 32},
        {
            "cls_token": "row 1",
            "position_embeddings": "row 5",
            "projection.weight|v_proj|o_proj|attention.output|value|pooler|fc2|output.dense": (
                "row 64"
            ),
            "q_proj|k_proj|query|key": "head 4",
            "fc1|intermediate": "row 96",
        },
    ),
}
MODELS_WITHOUT_A_CAUSAL_HEAD = ("T5", "Whisper", "ViT")


def build(name: str) -> nn.Module:
    config = getattr(hf, f"{name}Config")(**CASES[name][0])
    auto = hf.AutoModel if name in MODELS_WITHOUT_A_CAUSAL_HEAD else hf.AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


def resolve_all(model: nn.Module, blocks="auto", **kwargs) -> Iterator[tuple[str, tuple, Blocks]]:
    facts = read_architecture(model)
    for name, param in model.named_parameters(remove_duplicate=False):
        shape = tuple(param.shape)
        yield name, shape, resolve(blocks, name, shape, facts=facts[name], **kwargs)


def summary(model: nn.Module, blocks="auto", **kwargs) -> dict[str, str]:
    return {
        name: f"{found.kind} {found.num_blocks(shape)}"
        for name, shape, found in resolve_all(model, blocks, **kwargs)
    }
