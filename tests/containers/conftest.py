"""One engine for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import engine as own
import pytest


@pytest.fixture(scope="session")
def engine() -> Iterator[Path]:
    """The folder of a running engine."""
    with own.engine() as directory:
        yield directory


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder that any user may write to, for /workspace/runs."""
    directory = tmp_path / "runs"
    directory.mkdir()
    directory.chmod(0o1777)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o055)
    return directory
