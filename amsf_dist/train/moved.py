"""What became of a step."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Moved"]


class Moved(NamedTuple):
    """What every trainer tells of a step.

    Attributes:
        norm: of the whole gradient before clipping; NaN: not known.
        applied: False: skipped, as far as this process has seen.
    """

    norm: float
    applied: bool
