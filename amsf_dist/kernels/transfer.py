"""Moments and lines as plain numbers per element: what other optimizers and FSDP1 keep and want."""

from __future__ import annotations

import torch
from torch import Tensor

from amsf_dist.kernels.holding import Holding, Partition
from amsf_dist.kernels.lines import flat_line, flat_lines, put_back, put_lines_back
from amsf_dist.kernels.tiles import sections, tiles

__all__ = [
    "add_means",
    "gather_",
    "gather_scales_",
    "read_line",
    "spread",
    "spread_scales",
    "take_means_",
    "write_line_",
]


def spread(holding: Holding, partition: Partition | None) -> Tensor:
    """The block moments written out over the elements, laid out as this rank's memory.

    Args:
        holding: the tensor.
        partition: one of its; None: zeros.
    """
    out = torch.zeros_like(holding.memory(holding.param), dtype=holding.exp_avg_sq.dtype)
    if partition is None:
        return out
    moments = partition.moments
    for piece in partition.layout.pieces:
        line = flat_line(out, piece)
        for section in sections(piece):
            blocks = slice(section.first_block, section.first_block + section.num_blocks)
            part = line[section.start : section.stop].view(section.num_blocks, -1)
            part.copy_(moments[blocks].view(-1, 1))
        put_back(out, piece, line)
    return out


def gather_(partition: Partition, spread_out: Tensor) -> None:
    """Take the block moments back from what `spread` wrote: every block's first element here."""
    for piece in partition.layout.pieces:
        line = flat_line(spread_out, piece)
        for section in sections(piece):
            blocks = slice(section.first_block, section.first_block + section.num_blocks)
            part = line[section.start : section.stop].view(section.num_blocks, -1)
            partition.moments[blocks].copy_(part[:, 0])


def add_means(partition: Partition, values: Tensor) -> None:
    """Add this rank's share of the mean of every block to its sums; not for element blocks.

    Args:
        partition: whose blocks.
        values: laid out as this rank's memory.
    """
    for piece in partition.layout.pieces:
        if piece.part.elementwise:
            continue
        line = flat_line(values, piece)
        # fp64, so that the mean of equal fp32 numbers is that number
        means = torch.zeros(piece.num_sums, dtype=torch.float64, device=values.device)
        for tile in tiles(piece, values.device):
            part = line[tile.start : tile.stop].double().view(tile.num_blocks, -1)
            first = tile.first_block - piece.first_block
            means[first : first + tile.num_blocks] += part.sum(1)
        sums = partition.sums[piece.first_sum : piece.first_sum + piece.num_sums]
        sums += (means / piece.part.blocks.block_numel).to(sums.dtype)


def take_means_(partition: Partition) -> None:
    """Make the agreed means of `add_means` the block moments."""
    for piece in partition.layout.pieces:
        if not piece.part.elementwise:
            moments = partition.moments[piece.first_block : piece.first_block + piece.num_blocks]
            moments.copy_(partition.sums[piece.first_sum : piece.first_sum + piece.num_sums])


def read_line(holding: Holding, index: int) -> Tensor:
    """One of the rule's lines as plain numbers, a new tensor laid out as this rank's memory."""
    out = torch.zeros_like(holding.memory(holding.param), dtype=holding.compute_dtype)
    storage = holding.lines[index].storage
    for piece, tiles_here in holding.tiled:
        numbers, tensors = flat_line(out, piece), flat_lines(holding, piece)[index]
        for tile in tiles_here:
            numbers[tile.span].copy_(storage.load(tensors, tile.span, out.dtype, tile.groups))
        put_back(out, piece, numbers)
    return out


def write_line_(holding: Holding, index: int, values: Tensor) -> None:
    """Store plain numbers, laid out as this rank's memory, in one of the rule's lines.

    A group that a shard boundary cuts gets a scale on every rank, of what lies there: a rank reads
    its own, and the next step agrees on one.
    """
    storage, shared = holding.lines[index].storage, _shared_peaks(holding, values)
    for piece, tiles_here in holding.tiled:
        numbers, lines = flat_line(values, piece), flat_lines(holding, piece)
        for tile in tiles_here:
            groups = tile.groups._replace(peaks=shared[list(tile.shared)])
            storage.store(lines[index], tile.span, numbers[tile.span], None, groups)
        put_lines_back(holding, piece, lines)


def _shared_peaks(holding: Holding, values: Tensor) -> Tensor:
    """Largest magnitudes here of the groups that tiles share, and a zero for all others."""
    grouping = holding.grouping
    peaks = torch.zeros(1 + (len(grouping.shared) if grouping else 0), device=values.device)
    for number, group in enumerate(grouping.shared if grouping else ()):
        line = flat_line(values, holding.layout.pieces[group.piece])
        for tile in group.parts:
            peaks[number] = torch.maximum(peaks[number], line[tile.span].abs().max().float())
    return peaks


def spread_scales(holding: Holding, index: int) -> Tensor:
    """The scales of a line in groups written out over its numbers, laid out as this rank's memory.

    What a state dict keeps: it can be cut anywhere, and every part has the scales of its numbers.
    """
    (scales,) = holding.lines[index].by_group
    out = torch.zeros_like(holding.memory(holding.param), dtype=scales.dtype)
    for piece, tiles_here in holding.tiled:
        line = flat_line(out, piece)
        for tile in tiles_here:
            group = holding.lines[index].storage.group
            at = torch.arange(tile.phase, tile.phase + tile.stop - tile.start, device=out.device)
            line[tile.span].copy_(scales[tile.first_group + at // group])
        put_back(out, piece, line)
    return out


def gather_scales_(holding: Holding, index: int, spread_out: Tensor) -> None:
    """Take the scales back from what `spread_scales` wrote: every group's first number here."""
    (scales,) = holding.lines[index].by_group
    group = holding.lines[index].storage.group
    for piece, tiles_here in holding.tiled:
        line = flat_line(spread_out, piece)
        for tile in tiles_here:
            firsts = torch.arange(tile.start, tile.stop, group, device=line.device)
            if tile.phase:  # the first number of every further group
                firsts = torch.cat([firsts[:1], firsts + group - tile.phase])
            firsts = firsts[firsts < tile.stop]
            scales[tile.first_group : tile.first_group + len(firsts)].copy_(line[firsts])
