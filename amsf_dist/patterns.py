"""The `blocks=` argument: one kind for all parameters, or rules by name pattern."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from amsf_dist.names import canonical_name

__all__ = ["KINDS", "check", "check_head_dim", "unmatched_patterns"]

KINDS = ("auto", "adam_mini", "row", "tensor", "element", "factored")
_RULE_KINDS = ("element", "row", "head", "tensor", "factored", "auto", "adam_mini")
_RULE_KEYS = ("pattern", "kind", "head_dim")
_KINDS_WITH_HEADS = ("head", "auto", "adam_mini")


def check(blocks: Any) -> str | list[dict[str, Any]]:
    """Validate the `blocks=` argument.

    Args:
        blocks: one of `KINDS`, or a list of rules
            `{"pattern": regex, "kind": kind, "head_dim": int (optional)}`.

    Returns:
        The same as plain data, detached from what was passed: parameter groups and checkpoints
        carry it.

    Raises:
        TypeError: `blocks`, a rule, or a rule's value has the wrong type.
        ValueError: a kind or key is not known, a key is missing, or a pattern is not a regex.
    """
    if isinstance(blocks, str):
        _check_kind("blocks", blocks, KINDS)
        return blocks
    if not isinstance(blocks, Sequence):
        raise TypeError(
            f"blocks must be one of {_listed(KINDS)} or a list of rules, got {blocks!r}"
        )
    return [_check_rule(f"blocks[{index}]", rule) for index, rule in enumerate(blocks)]


def unmatched_patterns(blocks: Any, names: Iterable[str]) -> list[str]:
    """Patterns of a rule list that match none of these parameter names; the caller warns."""
    rules = check(blocks)
    if isinstance(rules, str):
        return []
    known = [canonical_name(name) for name in names]
    patterns = [str(rule["pattern"]) for rule in rules]
    return [p for p in patterns if not any(re.search(p, name) for name in known)]


def _check_rule(where: str, rule: Any) -> dict[str, Any]:
    if not isinstance(rule, Mapping):
        raise TypeError(
            f"{where} must be a rule such as {{'pattern': 'lm_head', 'kind': 'row'}}, got {rule!r}"
        )
    for key in rule:
        if key not in _RULE_KEYS:
            raise ValueError(
                f"{where} has the unknown key {key!r}; allowed: {_listed(_RULE_KEYS)}"
                f"{_did_you_mean(key, _RULE_KEYS)}"
            )
    for key in ("pattern", "kind"):
        if key not in rule:
            raise ValueError(f"{where} lacks {key!r}, got {dict(rule)!r}; every rule needs it")
    pattern, kind = rule["pattern"], rule["kind"]
    if not isinstance(pattern, str):
        raise TypeError(f"{where}['pattern'] must be a regular expression, got {pattern!r}")
    if not pattern:
        raise ValueError(f"{where}['pattern'] is empty; use '.*' to match every parameter")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{where}['pattern'] is not a regular expression: {pattern!r} ({error}); put a "
            "backslash before characters meant literally"
        ) from None
    _check_kind(f"{where}['kind']", kind, _RULE_KINDS)
    if rule.get("head_dim") is None:
        return {"pattern": pattern, "kind": kind}
    check_head_dim(f"{where}['head_dim']", rule["head_dim"])
    if kind not in _KINDS_WITH_HEADS:
        raise ValueError(
            f"{where} has head_dim={rule['head_dim']}, which kind {kind!r} does not use; remove it "
            f"or use kind 'head'"
        )
    return {"pattern": pattern, "kind": kind, "head_dim": rule["head_dim"]}


def _check_kind(where: str, kind: Any, allowed: Sequence[str]) -> None:
    if not isinstance(kind, str):
        raise TypeError(f"{where} must be one of {_listed(allowed)}, got {kind!r}")
    if kind == "head" and kind not in allowed:
        raise ValueError(
            f"{where}='head' fits some parameters only; use 'auto', or a rule such as "
            "{'pattern': '(q|k)_proj', 'kind': 'head', 'head_dim': 128}"
        )
    if kind not in allowed:
        raise ValueError(
            f"{where} must be one of {_listed(allowed)}, got {kind!r}{_did_you_mean(kind, allowed)}"
        )


def check_head_dim(where: str, head_dim: Any) -> None:
    """Refuse a `head_dim` that is not a positive whole number; `where` names it in the message."""
    if isinstance(head_dim, bool) or not isinstance(head_dim, int):
        raise TypeError(f"{where} must be a whole number (rows per head), got {head_dim!r}")
    if head_dim < 1:
        raise ValueError(f"{where} must be >= 1 (rows per head), got {head_dim}")


def _listed(words: Sequence[str]) -> str:
    return ", ".join(map(repr, words))


def _did_you_mean(word: Any, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(word).lower(), allowed, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
