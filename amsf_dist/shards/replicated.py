"""One process, DDP, and everything else whose tensors hold whole parameters."""

from __future__ import annotations

from amsf_dist.shards.layout import Layout, Part, Piece, Span
from amsf_dist.shards.runs import box_runs
from amsf_dist.shards.vector import line_shape, vector_shape

__all__ = ["replicated"]


def replicated(part: Part) -> Layout:
    """The whole parameter lies here; gradients arrive already averaged, nothing is cut."""
    line = line_shape(part.shape, part.blocks)
    runs = box_runs(line, [0] * len(line), line, part.blocks.block_numel)
    span = Span(0, line, (0,) * len(line), line)
    vector = vector_shape(part.shape, part.blocks)
    kept = Span(0, vector, (0,) * len(vector), vector)
    return Layout(
        pieces=(Piece(part, runs, 0, part.num_blocks, spans=(span,), kept=kept),),
        as_state=lambda moments: moments.view(vector),
        first=0 if runs else None,
    )
