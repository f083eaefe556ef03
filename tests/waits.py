"""Raise where the host would wait for a device; and take the CPU for one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NoWaiting", "a_device"]

WAITS = {
    "aten::_local_scalar_dense",  # item(), float(), bool(), tolist()
    "aten::item",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::equal",
    "aten::masked_select",
    "aten::_unique2",
}


class NoWaiting(TorchDispatchMode):
    """Raise where the host would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in WAITS, f"{func._schema.name} waits for the device"
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Counts what would be launched: views are not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aliases = any(own.alias_info is not None for own in func._schema.returns)
        if not aliases or func._schema.is_mutable:
            self.names.append(str(func))
        return result


@contextmanager
def a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, `amsf_dist` takes the CPU for a device."""
    with monkeypatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("amsf_dist.") and hasattr(module, "on_host"):
                patch.setattr(module, "on_host", lambda device: False)
        yield
