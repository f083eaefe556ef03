"""Memory that comes and goes during a step: what is held by whom, and when it is most."""

from __future__ import annotations

from collections import Counter

__all__ = ["OWNERS", "Ledger"]

OWNERS = (
    "weights",
    "masters",
    "error_bits",
    "gap",
    "exp_avg",
    "exp_avg_sq",
    "v",
    "gradients",
    "gathered",
    "reduced",
)
"""In the order of the table. `gathered`: whole weights of sharded modules and the buffers that
bring them; `reduced`: whole gradients on their way to the ranks that keep them, with buffers."""


class Ledger:
    """Bytes by owner.

    Attributes:
        now: what is held.
        fullest: what was held when it was most together.
        most: of every owner, at different moments.
    """

    def __init__(self, held: dict[str, int] | None = None) -> None:
        """Begin.

        Args:
            held: what lies there all the time.
        """
        self.now: Counter[str] = Counter(held or {})
        self.fullest: Counter[str] = Counter(self.now)
        self.most: Counter[str] = Counter(self.now)

    def take(self, owner: str, size: int) -> int:
        """Allocate bytes; gives them back as a receipt for `give`."""
        self.now[owner] += size
        self.most[owner] = max(self.most[owner], self.now[owner])
        if self.now.total() > self.fullest.total():
            self.fullest = Counter(self.now)
        return size

    def give(self, owner: str, size: int) -> None:
        """Free bytes."""
        self.now[owner] -= size
        assert self.now[owner] >= 0, f"{owner} gives back more than it took"

    def at_the_fullest(self) -> dict[str, int]:
        """What was held then, in the order of `OWNERS`, without zeros."""
        return {owner: self.fullest[owner] for owner in OWNERS if self.fullest[owner]}
