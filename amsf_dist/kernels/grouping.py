"""Groups of numbers that share a scale, as they lie in this rank's memory of one tensor.

Most groups lie in one tile, and their scale is found when the tile is stored. The others are
*shared*, with other tiles or with other ranks: their largest number is sought first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from amsf_dist.kernels.tiles import Tile, cut, sections
from amsf_dist.shards import Layout, Piece
from amsf_dist.shards.runs import Run, Section, contiguous_runs, in_whole_runs
from amsf_dist.storage.grouped import GROUP

__all__ = ["Grouping", "Shared", "num_groups"]


class Shared(NamedTuple):
    """A group that does not lie in one tile.

    Attributes:
        piece: number of the piece it belongs to.
        slot: in the payload of the piece's seam; None where other ranks have no part of it.
        parts: what lies here of it.
    """

    piece: int
    slot: int | None
    parts: list[Tile]


@dataclass
class Grouping:
    """The groups of one tensor.

    Attributes:
        num_groups: scales on this rank.
        tiles: of every piece; each lies in consecutive groups, and says which of the shared ones
            its first and its last group are.
        shared: groups whose peak is sought before they are stored.
    """

    num_groups: int = 0
    tiles: list[list[Tile]] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)

    @classmethod
    def of(cls, layout: Layout, device_type: str) -> Grouping:
        """Work out the groups, once.

        Args:
            layout: of the tensor.
            device_type: whose tiles are used.
        """
        grouping = cls()
        for piece in layout.pieces:
            grouping._add(piece, device_type)
        return grouping

    def only(self, pieces: Sequence[int]) -> Grouping:
        """Of these pieces alone, which are numbered anew; all shared groups are theirs, or none."""
        number = {piece: at for at, piece in enumerate(pieces)}
        own = [group for group in self.shared if group.piece in number]
        shared = [group._replace(piece=number[group.piece]) for group in own]
        return Grouping(self.num_groups, [self.tiles[piece] for piece in pieces], shared)

    def _add(self, piece: Piece, device_type: str) -> None:
        numel = math.prod(piece.part.shape)
        known: dict[tuple[str, int], int] = {}
        tiles: list[Tile] = []

        def shared(stretch: _Stretch, tile: Tile, group: int) -> int:
            """Which shared group it is; -1 if it lies in this tile alone."""
            first = stretch.first
            size = GROUP if first is None else min(GROUP, numel - (first + group) * GROUP)
            begin = stretch.run.offset - stretch.run.phase + group * GROUP
            start, stop = max(tile.start, begin), min(tile.stop, begin + GROUP)
            if stop - start == size:
                return -1
            here = self.num_groups + stretch.run.first_block + group
            key = ("here", here) if first is None else ("line", first + group)
            if key not in known:
                known[key] = len(self.shared)
                self.shared.append(Shared(len(self.tiles), _slot(piece, first, group), []))
            self.shared[known[key]].parts.extend(
                Tile.of(part, first_group=here, phase=part.start - begin)
                for part in tile.section.clip(start, stop)
            )
            return known[key]

        for stretch, section in _overlaps(piece):
            for tile in cut(section, device_type, GROUP):
                before = tile.start - stretch.run.offset + stretch.run.phase
                first, last = before // GROUP, (before + tile.stop - tile.start - 1) // GROUP
                ends = [shared(stretch, tile, group) for group in dict.fromkeys((first, last))]
                tiles.append(
                    tile._replace(
                        first_group=self.num_groups + stretch.run.first_block + first,
                        phase=before % GROUP,
                        shared=(ends[0], ends[-1]),
                    )
                )
        self.num_groups += num_groups(piece)
        self.tiles.append(tiles)


def num_groups(piece: Piece) -> int:
    """Scales that a rank keeps for a piece."""
    return sum(stretch.run.num_blocks for stretch in _stretches(piece))


class _Stretch(NamedTuple):
    """Numbers of the flat line that are contiguous in the parameter's line, or whole groups of it.

    Attributes:
        run: its groups, counted in the piece. A group that several stretches have parts of counts
            in each.
        first: the group of the whole line in which it begins; None where whole groups lie here
            that are not neighbours in the line.
    """

    run: Run
    first: int | None


def _stretches(piece: Piece) -> Iterator[_Stretch]:
    groups = 0
    for span in piece.spans:
        box = span.shape, span.offsets, span.lengths
        if in_whole_runs(*box, GROUP):  # told at once, and not row by row
            numel = math.prod(span.lengths)
            yield _Stretch(Run(span.position, numel, 0, GROUP, groups), None)
            groups += numel // GROUP
            continue
        for run in contiguous_runs(*box, GROUP):
            moved = replace(run, offset=run.offset + span.position, first_block=groups)
            yield _Stretch(moved, run.first_block)
            groups += run.num_blocks


def _overlaps(piece: Piece) -> Iterator[tuple[_Stretch, Section]]:
    """The piece's sections, cut where stretches end; both are in memory order."""
    left = sections(piece)
    section = next(left, None)
    for stretch in _stretches(piece):
        stop = stretch.run.offset + stretch.run.numel
        while section is not None and section.start < stop:
            for part in section.clip(stretch.run.offset, stop):
                yield stretch, part
            if section.stop > stop:
                break
            section = next(left, None)


def _slot(piece: Piece, first: int | None, group: int) -> int | None:
    """Where ranks that share the group look for its peak."""
    if piece.seam is None or first is None:
        return None
    return first + group if piece.seam.slots is None else piece.seam.slots.get(first + group)
