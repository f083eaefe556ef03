"""From a YAML file and `key=value` words to a `Config`, or to one line that says what is wrong."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from amsf_dist.train.config import Config
from amsf_dist.train.errors import UserError, one_line

__all__ = ["did_you_mean", "load_config", "parse_overrides"]


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-3` is a number, and a key given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, put the overrides on top, and validate.

    Args:
        path: YAML file.
        overrides: words such as `amsf.lr=3e-3`; the value is YAML.

    Raises:
        UserError: naming the file (or the command line), the dotted key, the value, and the cure.
    """
    given = parse_overrides(overrides)
    values = _read(Path(path))
    for dotted, value in given.items():
        _put(values, dotted, value)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, str(path), given)) from None


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """Return `{dotted key: value}` for words such as `data.sequence_length=128`.

    Raises:
        UserError: for a word that is not `key=value` or a value that is not YAML.
    """
    given: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise UserError(
                f"command line: {word!r} is not key=value; "
                "write for example steps=100 or amsf.lr=3e-3"
            )
        try:
            given[key] = yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
        except yaml.YAMLError as error:
            raise UserError(f"command line: {word!r}: {_yaml_problem(error)}") from None
    return given


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean ...?`, or the list of known words when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  (a SafeLoader)
    except FileNotFoundError:
        near = [str(name) for name in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = difflib.get_close_matches(str(path), near, n=1, cutoff=0.6)
        cure = f"did you mean {hint[0]}?" if hint else "give the path of a YAML file"
        raise UserError(f"{path}: no such config file; {cure}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: {_yaml_problem(error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; a config is a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a YAML file") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no `key: value` lines; see configs/quickstart.yaml")
    return values


def _yaml_problem(error: yaml.YAMLError) -> str:
    return f"not valid YAML: {getattr(error, 'problem', None) or one_line(error)}"


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for depth, name in enumerate(parents):
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            raise UserError(
                f"command line: {dotted}: {'.'.join(parents[: depth + 1])} is {values!r}, "
                "which has no keys"
            )
    values[last] = value


def _explain(error: ValidationError, path: str, overrides: dict[str, Any]) -> str:
    """Turn the first of pydantic's findings into one line; say how many other keys are wrong."""
    findings = error.errors(include_url=False)
    # An unknown key is the likeliest cause of the others, so it goes first.
    first = min(findings, key=lambda finding: finding["type"] != "extra_forbidden")
    location = _location(first)
    dotted = ".".join(location)
    related = any(
        f"{dotted}.".startswith(f"{key}.") or key.startswith(f"{dotted}.") for key in overrides
    )
    where = "command line" if dotted and related else path
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    if kind == "extra_forbidden":
        hint = did_you_mean(location[-1], _fields(location[:-1]))
        message = f"unknown key {dotted}; {hint}"
    elif kind == "missing":
        message = f"the key {dotted} is missing; add a line `{dotted}: ...`"
    elif kind == "value_error":
        message = f"{dotted}: {context['error']}" if dotted else str(context["error"])
    else:
        same_key = [finding for finding in findings if _location(finding) == location]
        wanted = " or ".join(dict.fromkeys(_wanted(finding) for finding in same_key))
        message = f"{dotted} must be {wanted}, got {one_line(json.dumps(value, default=str), 80)}"
        if isinstance(value, str) and re.fullmatch(r"[-+.\d][\d.eE+-]*", value):
            message += " (text; write it without quotes)"
    more = len({_location(finding) for finding in findings}) - 1
    return f"{where}: {message}" + (f" (and {more} more)" if more else "")


def _location(finding: Any) -> tuple[str, ...]:
    """Return the keys that lead to a finding, without pydantic's names for parts of a union."""
    location = [str(part) for part in finding["loc"]]
    if finding["type"] == "extra_forbidden":
        return tuple(location)
    depth = 0
    while depth < len(location) and (
        location[depth].isdigit() or location[depth] in _fields(location[:depth])
    ):
        depth += 1
    return tuple(location[:depth])


def _wanted(finding: Any) -> str:
    context = finding.get("ctx", {})
    match finding["type"]:
        case "int_type" | "int_from_float" | "int_parsing":
            return "a whole number"
        case "float_type" | "float_parsing":
            return "a number"
        case "bool_type" | "bool_parsing":
            return "true or false"
        case "string_type":
            return "text"
        case "dict_type" | "model_type":
            return "a section of `key: value` lines"
        case "list_type" | "too_short" | "too_long" as kind:
            length = context.get("min_length" if kind == "too_short" else "max_length")
            return "a list" if length is None else f"a list of {length}"
        case "literal_error":
            return str(context["expected"]).replace("'", "")
        case "greater_than":
            return f"above {context['gt']}"
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "less_than":
            return f"below {context['lt']}"
        case "less_than_equal":
            return f"at most {context['le']}"
        case "string_too_short":
            return "text that is not empty"
        case _:
            return one_line(finding["msg"])


def _fields(location: Sequence[str]) -> list[str]:
    """Return the keys that a section knows; none for what is not a section."""
    section: Any = Config
    for name in location:
        field = getattr(section, "model_fields", {}).get(name)
        section = field.annotation if field else None
    return list(getattr(section, "model_fields", ()))
