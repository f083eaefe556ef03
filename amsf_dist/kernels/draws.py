"""Random numbers for one piece: the same for the same number of a parameter, wherever it lies."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.tiles import Tile
from amsf_dist.rules.protocol import Scalar
from amsf_dist.shards import Piece
from amsf_dist.storage import Draw
from amsf_dist.storage.noise import bits, stream_of

__all__ = ["Draws", "stream_of_piece"]


class Draws:
    """Draws of one step: keyed on (seed, step, parameter, what is rounded, place in the line)."""

    def __init__(self, holding: Holding, piece: Piece, step: Scalar) -> None:
        """Draw nothing yet; most storages never ask.

        Args:
            holding: names the seed and the device.
            piece: of it.
            step: the parameter's count of steps.
        """
        self._seed: int = holding.group["seed"]
        self._device = holding.exp_avg_sq.device
        self._piece, self._step = piece, step if isinstance(step, Tensor) else int(step)

    def of(self, role: str, tile: Tile) -> Draw:
        """What draws for a tile's numbers.

        Args:
            role: "weight", or the name of the line that is rounded.
            tile: of the piece's flat line.
        """

        def draw(count: int) -> Tensor:
            places = self._piece.places(tile.start, tile.stop, self._device)
            stream = stream_of_piece(self._piece.part.name, role)
            return bits(places, self._seed, self._step, stream, count)

        return draw


stream_of_piece = cache(stream_of)
"""`stream_of`, once for every (name of the parameter, role)."""
