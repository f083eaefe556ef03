"""The update rules: arithmetic on plain numbers, one file each, found by looking into this folder.

A rule file defines `RULE`, an object of the `Rule` protocol. Nothing else in the package names a
rule, so adding a file here gives it every sharding, storage and checkpoint. A program of one's own
can do the same without touching the package: `RULES["mine"] = MyRule()`.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from amsf_dist.rules.protocol import Rule

__all__ = ["RULES", "Rule"]


def _found() -> dict[str, Rule]:
    modules = (import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__))
    rules = (module.RULE for module in modules if hasattr(module, "RULE"))
    return {rule.name: rule for rule in rules}


RULES: dict[str, Rule] = _found()
