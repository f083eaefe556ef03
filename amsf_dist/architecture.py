"""What the modules of a model say about its parameters: role, rows per head, stored order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from amsf_dist.names import HEAD_ROLES, canonical_name, is_key, role_of

__all__ = ["Facts", "read_architecture"]

# Attributes that hold the rows of one head. qk_head_dim stands first: in DeepSeek's configuration
# head_dim is only the rotary part of it.
_HEAD_DIM = (
    "qk_head_dim head_dim attention_head_size attn_head_size head_size key_value_proj_dim d_kv "
    "dim_head d_head kv_channels hidden_size_per_attention_head"
).split()
_VALUE_DIM = "v_head_dim head_v_dim value_head_dim".split()
_HEADS = "num_heads num_attention_heads n_heads n_head nhead heads num_head".split()
_KV_HEADS = "num_key_value_heads num_kv_heads n_kv_heads n_kv_head num_query_groups".split()
# Classes of transformers (4.5x, or still today) that multiply x @ weight and do not say so.
_TRANSPOSED_EXPERTS = frozenset(
    "Llama4TextExperts GptOssExperts Qwen3VLMoeTextExperts AriaGroupedExpertsGemm".split()
)
_WIDTH = "all_head_size embed_dim n_embd d_model hidden_size hidden_dim dim".split()


@dataclass(frozen=True)
class Facts:
    """What the module that owns a parameter says about it.

    Attributes:
        role: one of `amsf_dist.names.ROLES`.
        head_dim: rows per head where the role is `"query_key"` or `"fused_qkv"`; None = not known.
        order: permutation of the dims that puts output rows first; None = as stored.
        groups: convolution groups that share dim 0 of the permuted weight (`ConvTranspose` only).
        note: what could not be known, in words; shown by `explain`.
    """

    role: str
    head_dim: int | None = None
    order: tuple[int, ...] | None = None
    groups: int = 1
    note: str = ""


def read_architecture(model: nn.Module) -> dict[str, Facts]:
    """Read the facts of every parameter from the modules of `model`.

    Works on meta-device models and through DDP, FSDP1, FSDP2, `torch.compile`, activation
    checkpointing and ZeRO-3: only shapes and attributes are read, never values.

    Args:
        model: any module, wrapped or not.

    Returns:
        Canonical parameter name -> facts. A tied parameter stands under each of its names, with
        the same facts.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    unflattened = _unflattened(modules)
    facts: dict[str, Facts] = {}
    names_of: defaultdict[Hashable, list[str]] = defaultdict(list)
    for path, module in modules.items():
        for leaf, shape, identity in _parameters(module, unflattened.get(id(module), {})):
            name = canonical_name(f"{path}.{leaf}" if path else leaf)
            facts[name] = _read(name, shape, list(_outwards(path, modules)))
            names_of[identity].append(name)
    for tied in names_of.values():
        _agree(facts, tied)
    return facts


def _agree(facts: dict[str, Facts], tied: Sequence[str]) -> None:
    """Give all names of one parameter the same facts; an embedding's rows are the tokens."""
    roles = [facts[name].role for name in tied]
    chosen = facts[tied[roles.index("embedding") if "embedding" in roles else 0]]
    for name in tied:
        facts[name] = chosen


# What FSDP1 took from one module: attribute -> (original shape, identity of the parameter).
_Taken = dict[str, tuple[tuple[int, ...], Hashable]]


def _unflattened(modules: Mapping[str, nn.Module]) -> dict[int, _Taken]:
    """What FSDP1 took from its modules, by the id of the module.

    FSDP1 keeps one flat parameter per unit; the owners hold 1-D views of the local part, or
    nothing (`use_orig_params=False`).
    """
    taken: defaultdict[int, _Taken] = defaultdict(dict)
    for module in modules.values():
        flat = getattr(getattr(module, "_handle", None), "flat_param", None)
        if flat is None:
            continue
        for info, shape in zip(flat._param_infos, flat._shapes, strict=True):
            identity = (id(info.module), info.param_name)
            taken[id(info.module)][info.param_name] = tuple(shape), identity
        for tie in flat._shared_param_infos:
            original = taken[id(tie.prim_module)][tie.prim_param_name]
            taken[id(tie.module)][tie.param_name] = original
    return taken


def _parameters(
    module: nn.Module, taken: _Taken
) -> Iterator[tuple[str, tuple[int, ...], Hashable]]:
    """The module's own parameters as (attribute, global shape, identity)."""
    for leaf, param in module._parameters.items():
        if param is None or leaf in taken or is_lazy(param):
            continue
        # ZeRO-3 leaves an empty tensor behind and keeps the true shape beside it.
        yield leaf, tuple(getattr(param, "ds_shape", param.shape)), id(param)
    for leaf, (shape, identity) in taken.items():
        yield leaf, shape, identity


def _outwards(path: str, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """The owner of a parameter, then its parents up to the root."""
    if isinstance(modules[path], ParametrizationList):  # stands at <owner>.parametrizations.<name>
        path = ".".join(path.split(".")[:-2])
    while True:
        yield modules[path]
        if not path:
            return
        path = path.rpartition(".")[0]


def _read(name: str, shape: tuple[int, ...], outwards: Sequence[nn.Module]) -> Facts:
    owner, ndim = outwards[0], len(shape)
    attention = any("Attention" in cls for module in outwards[:2] for cls in _class_names(module))
    named = role_of(name, ndim, in_attention=attention)
    if _is_norm(owner) and named != "bias":
        return Facts("norm")
    if ndim < 2:
        return Facts(named)
    if isinstance(owner, _ConvNd):
        if owner.transposed:  # stored [in, out / groups, kernel...]
            return Facts("convolution", order=(1, 0, *range(2, ndim)), groups=owner.groups)
        return Facts("convolution")
    if isinstance(owner, nn.Bilinear | nn.RNNBase | nn.RNNCellBase):
        return Facts("linear")
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return Facts(named if named == "bias" else "embedding")  # T5's relative_attention_bias
    if ndim > 2:
        return _read_stack(named, shape, owner)
    conv1d = "Conv1D" in _class_names(owner) and hasattr(owner, "nf")
    order = (1, 0) if conv1d else None
    if named in HEAD_ROLES:
        rows = shape[1] if conv1d else shape[0]
        return replace(_read_heads(name, named, rows, outwards), order=order)
    if conv1d or (hasattr(owner, "in_features") and hasattr(owner, "out_features")):
        # The module is surer than the name: a linear layer called "norm1" is a linear layer.
        return Facts("value" if named == "value" else "linear", order=order)
    return Facts(named)


def _read_stack(named: str, shape: tuple[int, ...], owner: nn.Module) -> Facts:
    """Facts of a parameter with three or more dims that no torch module explains."""
    if len(shape) == 3 and (named == "experts" or hasattr(owner, "num_experts")):
        return Facts("experts", order=(0, 2, 1) if _experts_transposed(owner) else None)
    if named == "convolution" and not hasattr(owner, "kernel_size"):
        return Facts("other")  # four dims alone do not make a convolution
    return Facts(named)


def _read_heads(name: str, role: str, rows: int, outwards: Sequence[nn.Module]) -> Facts:
    """Rows per head, from the nearest parent, or its configuration, that knows about heads."""
    for module in outwards:
        for source in (module, getattr(module, "config", None)):
            candidates = _head_dims(source, name, role, rows)
            if not candidates:
                continue
            # Where none fits, the first is kept: the block rule then says that it does not divide.
            head_dim = next((n for n in candidates if rows % n == 0), candidates[0])
            value_dim = _first(source, _VALUE_DIM)
            if role == "fused_qkv" and value_dim not in (None, head_dim):
                note = f"value heads have {value_dim} rows, the others {head_dim}"
                return Facts(role, note=note)
            return Facts(role, head_dim)
    return Facts(role)


def _head_dims(source: Any, name: str, role: str, rows: int) -> list[int]:
    """Candidates for the rows of one head, most trustworthy first."""
    found = [n for attribute in _HEAD_DIM if (n := _positive(source, attribute))]
    nope, rope = _positive(source, "qk_nope_head_dim"), _positive(source, "qk_rope_head_dim")
    if nope and rope:
        found.insert(0, nope + rope)
    if found:
        return found
    heads = _first(source, _HEADS)
    if heads is None:
        return []
    kv_heads = _first(source, _KV_HEADS)
    width = _first(source, _WIDTH)
    if role == "fused_qkv":
        split = [heads + 2 * kv_heads] if kv_heads else []
        found = [rows // n for n in split if rows % n == 0]
        found += [width // heads] if width else [rows // (3 * heads)]
    elif is_key(name):
        found = [rows // kv_heads] if kv_heads else [(width or rows) // heads]
    else:
        found = [rows // heads]
    return [n for n in found if n > 0]


def _experts_transposed(owner: nn.Module) -> bool:
    """Whether expert weights are stored [experts, in, out]."""
    said = getattr(owner, "is_transposed", None)  # transformers 5 says it on most expert modules
    if isinstance(said, bool):
        return said
    return not _TRANSPOSED_EXPERTS.isdisjoint(_class_names(owner))


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | _NormBase):
        return True
    return any(cls.rstrip("123d").endswith("Norm") for cls in _class_names(module))


def _class_names(module: nn.Module) -> list[str]:
    """Names along the MRO: FSDP2 puts a class `FSDP<Name>` before the module's own."""
    return [cls.__name__ for cls in type(module).__mro__]


def _first(source: Any, attributes: Sequence[str]) -> int | None:
    return next((n for name in attributes if (n := _positive(source, name))), None)


def _positive(source: Any, attribute: str) -> int | None:
    try:
        value = getattr(source, attribute, None)
    except Exception:  # somebody's property: transformers raises for heads that vary by layer
        return None
    return value if type(value) is int and value > 0 else None
