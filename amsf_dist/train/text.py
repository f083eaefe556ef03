"""Where the text comes from: a file, a folder, a `datasets` directory, or CPython's own pages."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amsf_dist.train.config import DataConfig
from amsf_dist.train.errors import UserError, one_line

__all__ = ["PIECE_CHARACTERS", "check_source", "documents", "signature"]

PIECE_CHARACTERS = 1 << 20  # a file of any size is read in pieces of about this many characters
_DATASET_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")


def documents(data: DataConfig) -> Iterator[tuple[str, bool]]:
    """Yield the text as pieces `(text, ends_document)`, always in the same order.

    Bytes that are not UTF-8 become the replacement character; files with a NUL byte are taken for
    binary and left out of a folder.

    Raises:
        UserError: if the source does not exist or holds no text.
    """
    check_source(data)
    if data.path is None:
        yield from _python_documentation()
        return
    path = Path(data.path)
    if path.is_dir() and _is_dataset(path):
        for row in _dataset(path, data.column):
            yield str(row[data.column]), True
        return
    for file in _files(path):
        yield from _pieces(file)


def check_source(data: DataConfig) -> None:
    """Raise a UserError if there is no text to be had; reads little, writes nothing."""
    if data.path is None:
        if importlib.util.find_spec("pydoc_data.topics") is None:
            raise UserError(
                "data.path: this Python carries no pydoc_data.topics; give a text file or a folder"
            )
        return
    path = Path(data.path)
    if not path.exists():
        raise UserError(
            f"data.path: {data.path} does not exist (looked at {path.absolute()}); "
            "give a text file, a folder, or a directory written by datasets' save_to_disk"
        )
    if path.is_dir() and _is_dataset(path):
        _dataset(path, data.column)
        return
    if not _files(path):
        raise UserError(
            f"data.path: {data.path} holds no text file; hidden and binary files do not count"
        )
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"data.path: {data.path} is empty; give a file with text")


def signature(data: DataConfig) -> list[Any]:
    """Return what tells one state of the source from another: names, sizes, times."""
    if data.path is None:
        import sys

        return ["pydoc_data.topics", sys.version]
    path = Path(data.path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(file, file.stat()) for file in files]
    return [data.column, *([str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats)]


def _python_documentation() -> Iterator[tuple[str, bool]]:
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield topics.topics[name], True


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    visible = (
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    # Sorted by parts, so that the order does not depend on the file system or the separator.
    return sorted(filter(_is_text, visible), key=lambda file: file.relative_to(path).parts)


def _is_text(file: Path) -> bool:
    with file.open("rb") as opened:
        head = opened.read(8192)
    return bool(head) and b"\0" not in head


def _pieces(file: Path) -> Iterator[tuple[str, bool]]:
    with file.open(encoding="utf-8", errors="replace", newline="") as opened:
        text = opened.read(PIECE_CHARACTERS) + opened.readline()
        while text:
            following = opened.read(PIECE_CHARACTERS) + opened.readline()
            yield text, not following
            text = following


def _is_dataset(path: Path) -> bool:
    return any((path / mark).is_file() for mark in _DATASET_MARKS)


def _dataset(path: Path, column: str) -> Any:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError:
        raise UserError(
            f"data.path: {path} is a `datasets` directory and datasets is not installed; "
            "pip install datasets"
        ) from None
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"data.path: datasets cannot load {path}: {one_line(error)}") from None
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise UserError(
                f"data.path: {path} has no train split, only {', '.join(dataset)}; "
                f"give one of {path}/*"
            )
        dataset = dataset["train"]
    if column not in dataset.column_names:
        raise UserError(
            f"data.column: {path} has no column {column}; it has {', '.join(dataset.column_names)}"
        )
    return dataset
