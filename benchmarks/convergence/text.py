"""The text: CPython's own, cut so that nothing held out was trained on.

The pages of `pydoc_data.topics` and the sources of the standard library. The pages alone would not do:
1,500 steps read them nine times over, and then the study measures who over-fits, not who learns.
Pages and modules repeat one another (whole sections stand on two pages, licences in many modules),
so a paragraph is kept only where it comes first, and a training paragraph that shares a run of
`LONGEST_SHARED` characters with a held-out one is dropped.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amsf_dist.train.config import DataConfig
from amsf_dist.train.text import documents

__all__ = ["LONGEST_SHARED", "Text", "load_text", "split"]

EVERY, HELD_OUT = 29, 5  # documents with index % 29 == 5
LONGEST_SHARED = 64  # characters, white space counted as one blank
END_OF_TEXT = 256
_LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
}


@dataclass(frozen=True)
class Text:
    """Token numbers: the bytes of UTF-8, and 256 at the end of a document.

    Attributes:
        train: [num_train] uint16.
        held_out: [num_held_out] uint16.
        sha256: of both, so that tables made from different texts can be told apart.
    """

    train: np.ndarray
    held_out: np.ndarray
    sha256: str


def load_text() -> Text:
    """Read CPython's pages and modules and split them."""
    pages = [page for page, _ in documents(DataConfig())]
    parts = [_tokens(part) for part in split([*pages, *_modules()])]
    digest = hashlib.sha256(b"|".join(part.tobytes() for part in parts)).hexdigest()
    return Text(*parts, digest)


def split(texts: Iterable[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Paragraphs by document, to train on and held out, that share no long run of characters."""
    whole = _without_repetition(texts)
    held_out = [page for index, page in enumerate(whole) if index % EVERY == HELD_OUT]
    train = [page for index, page in enumerate(whole) if index % EVERY != HELD_OUT]
    hidden = {run for page in held_out for paragraph in page for run in _runs(paragraph)}
    train = [[p for p in page if hidden.isdisjoint(_runs(p))] for page in train]
    return train, held_out


def _modules() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def _without_repetition(texts: Iterable[str]) -> list[list[str]]:
    seen: set[str] = set()
    kept = []
    for text in texts:
        page = []
        for paragraph in re.split(r"\n[ \t]*\n", text):
            plain = _plain(paragraph)
            if plain and plain not in seen:
                seen.add(plain)
                page.append(paragraph)
        kept.append(page)
    return kept


def _plain(text: str) -> str:
    return " ".join(text.split())


def _runs(paragraph: str) -> Iterator[str]:
    plain = _plain(paragraph)
    return (
        plain[start : start + LONGEST_SHARED] for start in range(len(plain) - LONGEST_SHARED + 1)
    )


def _tokens(pages: list[list[str]]) -> np.ndarray:
    parts = []
    for page in filter(None, pages):
        parts.append(np.frombuffer("\n\n".join(page).encode(), np.uint8).astype(np.uint16))
        parts.append(np.array([END_OF_TEXT], np.uint16))
    return np.concatenate(parts)
