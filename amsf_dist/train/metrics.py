"""metrics.jsonl: one JSON object a line, the record from which every chart is drawn."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from amsf_dist.train.errors import UserError

__all__ = ["MetricsFile", "read_metrics"]


class MetricsFile:
    """Appends lines; a resumed run first drops those beyond its checkpoint."""

    def __init__(self, path: Path, done_steps: int) -> None:
        """Open the file for a run that has done `done_steps` steps."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = (
                [line for line in read_metrics(path) if line["step"] <= done_steps]
                if done_steps
                else []
            )
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(temporary, path)
        self._file = path.open("a")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a line and hand it to the operating system.

        Args:
            kind: `train`, `validation`, `optimizer`, `memory`.
            step: steps done.
            **values: numbers, text, dictionaries; a number that is not finite becomes null.
        """
        line = {
            "kind": kind,
            "step": step,
            **{name: _finite(value) for name, value in values.items()},
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; a last line cut short by a crash is left out.

    Raises:
        UserError: if there is no such file.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; give the output_dir of a run that `amsf train` has begun"
        ) from None
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
