"""A model in 16 bits: parameters, activations, gradients; what is asked to stay fp32 stays."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = ["cast_model"]

# Modules of the field's models that the two words stand for.
_WORDS = {"norm": re.compile(r"norm", re.IGNORECASE), "rotary": re.compile("rotary|rope", re.I)}


def cast_model(
    model: nn.Module, dtype: torch.dtype = torch.bfloat16, keep_fp32: Iterable[str | type] = ()
) -> nn.Module:
    """Cast a model for training in one 16-bit dtype; call it before `fully_shard` and before AMSF.

    Floating inputs of the model are cast too. Modules that stay in fp32 get their inputs in fp32
    and give `dtype` back, so that their neighbours need not know.

    Args:
        model: changed in place; tied weights stay tied.
        dtype: of parameters and floating buffers.
        keep_fp32: modules that stay (or become) fp32: "norm", "rotary" (recognised by the name of
            their class), a class, or any other text as a regular expression searched in module
            names. Under FSDP2 one `fully_shard` unit has one dtype: wrap these modules first.

    Returns:
        The model.

    Raises:
        ValueError: a text of `keep_fp32` matches no module, or the dtype is not 16 bits of float.
    """
    if not dtype.is_floating_point or dtype.itemsize != 2:
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, got {dtype}")
    kept: list[nn.Module] = []
    for what in keep_fp32:
        found = [m for name, m in model.named_modules() if _is(what, name, m)]
        if not found:
            names = sorted({type(module).__name__ for module in model.modules()})
            raise ValueError(f"keep_fp32: no module matches {what!r}; its classes are {names}")
        kept += found
    stays = {id(module) for module in kept for module in module.modules()}
    parameters = {id(p) for m in model.modules() if id(m) in stays for p in m.parameters(False)}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            target = torch.float32 if id(param) in parameters else dtype
            if param.is_floating_point():
                param.data = param.data.to(target)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                target = torch.float32 if id(module) in stays else dtype
                setattr(module, name, buffer.to(target))
    # outermost first, so that no module between them and the model's own works in another dtype
    inside = {id(m) for module in kept for m in module.modules() if m is not module}
    for module in {id(m): m for m in kept if id(m) not in inside}.values():
        module.register_forward_pre_hook(_cast_inputs(torch.float32), with_kwargs=True)
        module.register_forward_hook(_cast_output(dtype))
    if id(model) not in stays:
        model.register_forward_pre_hook(_cast_inputs(dtype), with_kwargs=True)
    return model


def _is(what: str | type, name: str, module: nn.Module) -> bool:
    if isinstance(what, type):
        return isinstance(module, what)
    if what in _WORDS:
        return _WORDS[what].search(type(module).__name__) is not None
    return re.search(what, name) is not None


def _cast(values: Any, dtype: torch.dtype) -> Any:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return tree_map_only(Tensor, cast, values)


def _cast_inputs(dtype: torch.dtype) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return _cast(args, dtype), _cast(kwargs, dtype)

    return hook


def _cast_output(dtype: torch.dtype) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return _cast(output, dtype)

    return hook
