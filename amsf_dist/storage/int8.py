"""A line in one byte per number and a scale per group: "int8"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from amsf_dist.storage.grouped import CUT_BITS, GROUP, decode, encode, highest
from amsf_dist.storage.protocol import Draw, Groups, zeros

__all__ = ["Int8"]


@dataclass(frozen=True)
class Int8:
    """int8 codes laid out as the parameter, and a bf16 scale per group of 64 of its line.

    Promise: see `grouped.encode`. The groups lie on the whole parameter's line, so the numbers do
    not depend on where it is cut, if ranks agree on the peaks of the groups that they share.
    """

    group: ClassVar[int] = GROUP

    def keys(self, line: str) -> tuple[str, ...]:
        """Two entries: codes and scales; "_scale" was the second one's name under another code."""
        return line, f"{line}_base"

    def allocate(self, line: str, like: Tensor) -> dict[str, Tensor]:
        """The codes, zero."""
        return {line: zeros(like, torch.int8)}

    def beside(self, line: str, like: Tensor) -> dict[str, Tensor]:
        """Nothing as large as the parameter."""
        return {}

    def load(
        self,
        tensors: tuple[Tensor, ...],
        span: slice,
        dtype: torch.dtype,
        groups: Groups | None = None,
    ) -> Tensor:
        """Decode."""
        assert groups is not None
        codes, scales = tensors
        numel = span.stop - span.start
        rows = _by_group(codes[span], groups.phase)
        here = scales[groups.first : groups.first + len(rows)]
        values = decode(rows, here).view(-1)[groups.phase : groups.phase + numel]
        return values.to(dtype)

    def store(
        self,
        tensors: tuple[Tensor, ...],
        span: slice,
        values: Tensor,
        draw: Draw | None = None,
        groups: Groups | None = None,
    ) -> None:
        """Encode, at random or to nearest without a draw."""
        assert groups is not None
        codes, scales = tensors
        rows = _by_group(values.to(torch.float32), groups.phase)
        bits = None if draw is None else _by_group(draw(CUT_BITS), groups.phase)
        here = slice(groups.first, groups.first + len(rows))
        coded, found = encode(rows, bits, _peaks(groups, scales[here]))
        codes[span].copy_(coded.view(-1)[groups.phase : groups.phase + values.numel()])
        scales[here].copy_(found)


def _peaks(groups: Groups, scales: Tensor) -> Tensor | None:
    """[groups] the least that their largest magnitudes are to be taken for; None: what they are."""
    if groups.peaks is None and groups.moves is None:
        return None
    peaks = torch.zeros_like(scales, dtype=torch.float32)
    if groups.moves is not None:  # with the scale of before, codes of before are found again
        still = groups.moves.logical_not()
        if still.dim():
            still = _by_group(still.reshape(-1).to(torch.int8), groups.phase).any(1)
        peaks += torch.where(still, highest(scales), 0.0)
    if groups.peaks is not None:
        peaks[0] = torch.maximum(peaks[0], groups.peaks[0])
        peaks[-1] = torch.maximum(peaks[-1], groups.peaks[1])
    return peaks


def _by_group(numbers: Tensor, phase: int) -> Tensor:
    """[groups, 64], zeros where a group's numbers are not here."""
    missing = -(phase + numbers.numel()) % GROUP
    return (pad(numbers, (phase, missing)) if phase or missing else numbers).view(-1, GROUP)
