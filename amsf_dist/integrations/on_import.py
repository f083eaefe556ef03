"""Call something once a module that may never be imported has been imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

__all__ = ["on_import"]


def on_import(name: str, call: Callable[[ModuleType], None]) -> None:
    """Call `call(module)` when the module has been imported: now, if it was before.

    Args:
        name: dotted, of the module.
        call: is given it.
    """
    if name in sys.modules:
        call(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, call))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as everybody else does, and adds a call after its loading."""

    def __init__(self, name: str, call: Callable[[ModuleType], None]) -> None:
        self._name, self._call = name, call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """None for all modules but one."""
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)  # once; and the search below must not come here again
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._call)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader, and a call after it."""

    def __init__(self, loader: importlib.abc.Loader, call: Callable[[ModuleType], None]) -> None:
        self._loader, self._call = loader, call

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the other loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Load, then call."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # it is who has the module's source
        self._loader.exec_module(module)
        self._call(module)
