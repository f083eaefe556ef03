"""What a parameter's name says about it: the wrapper-free name, and the ordered table of roles."""

from __future__ import annotations

import re

__all__ = ["HEAD_ROLES", "ROLES", "canonical_name", "is_key", "may_be_transposed", "role_of"]

ROLES = (
    "embedding",
    "query_key",
    "fused_qkv",
    "value",
    "linear",
    "convolution",
    "experts",
    "norm",
    "bias",
    "other",
)
HEAD_ROLES = ("query_key", "fused_qkv")

_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})

# Parts that say where a weight is stored, not what it does; the part before them is the stem.
# "base_layer" is PEFT's.
_STORAGE_PARTS = frozenset("weight weight_g weight_v base_layer".split())

# Every word below is compared with a whole path part. Adam-mini looks for substrings, which takes
# Phi-3's qkv_proj for v_proj, "monkey" for a key and mlp.norm for a matrix.
_FUSED = frozenset(
    "qkv wqkv qkv_proj to_qkv query_key_value in_proj_weight c_attn qkv_linear qkv_layer "
    "attn_qkv matmul_qkv fast_qkv".split()
)
_FUSED_IN_ATTENTION = frozenset("kv kv_proj to_kv wkv kv_linear key_value".split())
_QUERY = "q_proj wq q_b_proj wq_b to_q q_lin q_linear linear_q c_q q_attn query_proj to_query"
_QUERY += " query_projection query_layer query_global add_q_proj"
_KEY = "k_proj wk to_k k_lin k_linear linear_k c_k key_proj to_key"
_KEY += " key_projection key_layer key_global add_k_proj"
_QUERY_KEY = frozenset(f"{_QUERY} {_KEY}".split())
_KEYS = frozenset(f"{_KEY} key k".split())
_VALUE = frozenset(
    "v_proj wv value to_v v_lin v_linear linear_v c_v value_proj value_projection value_layer "
    "value_global add_v_proj kv_b_proj v_b_proj".split()
)
_PROJECTIONS = _FUSED | _QUERY_KEY | _VALUE
_LINEAR = frozenset(
    "o_proj wo out_proj to_out out_lin attn_out dense fc fc1 fc2 fc_in fc_out lin1 lin2 proj "
    "gate_proj up_proj down_proj gate_up_proj w1 w2 w3 wi wi_0 wi_1 c_fc c_proj project_in "
    "project_out q_a_proj kv_a_proj_with_mqa wq_a in_proj x_proj dt_proj in_proj_qkvz in_proj_qkv "
    "in_proj_ba router gate shared_expert_gate head lm_head classifier score pooler decoder "
    "intermediate".split()
)
_LINEAR_INSIDE = ("mlp", "feed_forward", "feedforward", "ffn", "linear", "output", "lora_")
_FEED_FORWARD = ("mlp", "feed_forward", "feedforward", "ffn")
_ATTENTION = re.compile(r"attn|attention|mha|(^|_)att($|_)")
_EMBEDDING = re.compile(r"embed|embd|^wte$|^wpe$|tokens?$|^query$")
_NORM = re.compile(r"norm|(^|_)(ln|bn|gn)\d*($|_)")
_NORM_STEM = re.compile(r"norm(_?\d+)?$|^ln(_\w+)?$")
_BIAS = re.compile(r"(^|_)bias(_|$)")
_BIAS_STEM = re.compile(r"(^|_)bias(_table)?$")
# GPT-2's Conv1D stores [in, out]; nanoGPT has the same names on nn.Linear, [out, in].
_CONV1D = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})


def canonical_name(name: str) -> str:
    """Strip what DDP, FSDP1, `torch.compile` and activation checkpointing add to a name.

    Args:
        name: a fully qualified parameter name, e.g. `module._orig_mod.layers.0.weight`.

    Returns:
        The name in the bare model, e.g. `layers.0.weight`.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts) or name


def role_of(name: str, ndim: int, *, in_attention: bool = False) -> str:
    """The role a canonical name claims; the first line of the table that fits wins.

    Args:
        name: canonical parameter name.
        ndim: dimensions of the parameter; only matrices have heads, rows or experts.
        in_attention: the module around it is known to be attention whatever its path says.

    Returns:
        One of `ROLES`; `"other"` when nothing fits.
    """
    parts = _parts(name)
    stem = _stem(parts)
    if _BIAS.search(parts[-1]) or _BIAS_STEM.search(stem):
        return "bias"
    if ndim < 2:
        return "norm" if _NORM.search(stem) else "other"
    if _NORM_STEM.search(stem):
        return "norm"
    if ndim >= 3:
        if "conv" in stem:
            return "convolution"
        if _EMBEDDING.search(stem):
            return "embedding"
        if any("expert" in part for part in parts):
            return "experts"
        return "convolution" if ndim > 3 else "other"
    if any(part.startswith("lora_") for part in parts):
        return "linear"  # an adapter's factor has no heads, whatever layer it adapts
    before = parts[:-1]
    attention = in_attention or any(_ATTENTION.search(part) for part in before)
    feed_forward = any(word in part for part in before for word in _FEED_FORWARD)
    if stem in _FUSED or (attention and stem in _FUSED_IN_ATTENTION):
        return "fused_qkv"
    if stem in _QUERY_KEY or (attention and stem in ("q", "k")):
        return "query_key"
    # RWKV calls an MLP weight "key"; a bare tensor called "query" is a table of tokens.
    if stem in ("query", "key") and parts[-1] != stem and not feed_forward:
        return "query_key"
    if stem in _VALUE or (attention and stem == "v"):
        return "value"
    if _EMBEDDING.search(stem):
        return "embedding"
    if stem in _LINEAR or (attention and stem == "o"):
        return "linear"
    if any(word in part for part in parts for word in _LINEAR_INSIDE):
        return "linear"
    return "other"


def is_key(name: str) -> bool:
    """Whether a canonical name of role `"query_key"` is the key (grouped attention has fewer)."""
    return _stem(_parts(name)) in _KEYS


def may_be_transposed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether name and shape leave it open that the matrix is stored [in, out], as GPT-2's are.

    Args:
        name: canonical parameter name.
        shape: global shape of the parameter.
    """
    stem = _stem(_parts(name))
    if len(shape) != 2 or stem not in _CONV1D:
        return False
    # These two have more outputs than inputs, so a tall matrix is nn.Linear's [out, in].
    return not (stem in ("c_attn", "c_fc") and shape[0] > shape[1])


def _parts(name: str) -> list[str]:
    """Lower-case path parts; a parametrized weight has those of the weight it stands for."""
    parts = name.lower().split(".")
    if "parametrizations" in parts[:-2]:  # <owner>.parametrizations.weight.original
        index = parts.index("parametrizations")
        parts = [*parts[:index], parts[index + 1]]
    return parts


def _stem(parts: list[str]) -> str:
    """The path part that names the layer: `q_proj` in `q_proj.weight` and in `q_proj_weight`."""
    if parts[-1] == "in_proj_weight":  # torch's fused projection; in_proj.weight is Mamba's
        return parts[-1]
    index = len(parts) - 1
    while index > 0 and parts[index] in _STORAGE_PARTS:
        index -= 1
    if parts[index] == "linear" and index > 0 and parts[index - 1] in _PROJECTIONS:
        index -= 1  # a wrapper around nn.Linear, as in Gemma 4's q_proj.linear.weight
    return parts[index].removesuffix("_weight")
