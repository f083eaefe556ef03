"""Files that are on the disk, whatever happens next."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["sync", "write_durably"]


def write_durably(path: Path, text: str) -> None:
    """Write a small file; when this returns, its content and its name are on the disk."""
    path.write_text(text)
    sync(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Put a file's content, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
