"""How a step went, for people who look: by parameter, added up over the ranks."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from amsf_dist.kernels import Holding
from amsf_dist.kernels.lines import flat_line, flat_tensors
from amsf_dist.kernels.tiles import sections
from amsf_dist.kernels.transfer import read_line
from amsf_dist.optimizer import AMSF
from amsf_dist.roots import root
from amsf_dist.samples import MOST_BLOCKS, Sample
from amsf_dist.shards import Piece

__all__ = ["Figures", "StaleBlocks", "StepWatch"]


@dataclass(frozen=True)
class Figures:
    """The step of one parameter, or of all together.

    Attributes:
        lr: learning rate after warm-up.
        ckp1: averaging weight; 0 under `averaging="ema"`.
        distance: root mean square of x - y; 0 under `averaging="ema"`.
        stale: share of the sampled numbers whose weight, as it is stored, is what it was before
            the step, although their line (gap, exp_avg) is not zero: the update was rounded away.
        clipped: share that clipping made smaller: with `clip="block"` of the numbers in blocks
            (elements that are blocks of their own are not counted), else of the parameters.
    """

    lr: float
    ckp1: float
    distance: float
    stale: float
    clipped: float


@dataclass(frozen=True)
class StaleBlocks:
    """How stale updates are spread over the blocks of one parameter.

    Attributes:
        sampled: blocks that were looked at, and have something to lose; at most 64.
        wholly: share of them in which every update was rounded away.
        worst: share of the updates that was, in the block where it is largest.
    """

    sampled: int
    wholly: float
    worst: float


@dataclass
class _Totals:
    """What adds up over ranks and parameters."""

    params: float = 0.0
    lr: float = 0.0
    ckp1: float = 0.0
    numel: float = 0.0
    square: float = 0.0
    sampled: float = 0.0
    stale: float = 0.0
    clippable: float = 0.0
    clipped: float = 0.0

    def once(self, numel: int) -> _Totals:
        """With every number counted once: several ranks may hold the same."""
        copies = self.numel / numel if self.numel else 1.0
        return _Totals(*(value / copies for value in astuple(self)))

    def figures(self) -> Figures:
        return Figures(
            lr=_ratio(self.lr, self.params),
            ckp1=_ratio(self.ckp1, self.params),
            distance=math.sqrt(_ratio(self.square, self.numel)),
            stale=_ratio(self.stale, self.sampled),
            clipped=_ratio(self.clipped, self.clippable),
        )


class StepWatch:
    """Watches one step; every rank watches the same ones.

    `before` and `after` go around whatever moves the weights: `optimizer.step()`, or the backward
    pass with gradient release. It costs a pass over the rule's line, a copy of 65,536 numbers of
    every parameter, and an all-reduce of 137 numbers per parameter: watch one step in many. The
    numbers are the first ones of 64 blocks, or of all where there are fewer; a block that ranks
    share is sampled on each of them.
    """

    def __init__(self, optimizer: AMSF) -> None:
        """Watch this one, in training mode, its model wrapped."""
        self._optimizer = optimizer
        self._before: dict[int, list[tuple[Sample, tuple[Tensor, ...]]]] = {}
        self._totals: dict[str, _Totals] = {}
        self._stale: dict[str, Tensor] = {}  # [live or stale, block] of every parameter

    @torch.no_grad()
    def before(self) -> None:
        """Remember a sample of the weights."""
        self._before = {
            id(holding): [_sampled(holding, piece) for piece in holding.layout.pieces]
            for holding in self._optimizer.holdings
        }

    @torch.no_grad()
    def after(self) -> Figures:
        """What became of the step; the same on every rank, and every rank must call it."""
        self._totals = {part.name: _Totals() for part in self._optimizer.parts}
        self._stale = {name: torch.zeros(2, MOST_BLOCKS).double() for name in self._totals}
        for lane in self._optimizer.lanes:
            told = lane.rule.told(lane.counters.values, lane.group)
            told["step"] = lane.counters.values["step"]
            for holding in lane.holdings:
                own = {name: float(column[holding.index]) for name, column in told.items()}
                self._add(holding, own)
        self._before = {}
        numels = {part.name: math.prod(part.shape) for part in self._optimizer.parts}
        everywhere = _over_ranks(self._totals, self._stale)
        self._totals = {name: one.once(numels[name]) for name, one in everywhere.items()}
        whole = [sum(numbers) for numbers in zip(*map(astuple, self._totals.values()), strict=True)]
        return _Totals(*whole).figures()

    @property
    def by_parameter(self) -> dict[str, Figures]:
        """The same for every parameter that anyone holds, after `after`."""
        return {name: one.figures() for name, one in self._totals.items() if one.numel}

    @property
    def stale_by_block(self) -> dict[str, StaleBlocks]:
        """Of every parameter with a sampled number that has something to lose, after `after`."""
        return {name: _spread(*counts) for name, counts in self._stale.items() if counts[0].any()}

    def _add(self, holding: Holding, told: dict[str, float]) -> None:
        before = self._before.get(id(holding))
        beta1 = holding.group["betas"][0]
        line = read_line(holding, 0)
        for number, piece in enumerate(holding.layout.pieces):
            totals, numbers = self._totals[piece.part.name], flat_line(line, piece)
            here = [numbers[section.start : section.stop] for section in sections(piece)]
            numel = sum(map(torch.numel, here))
            if not numel:
                continue
            of_parameter = numel / math.prod(piece.part.shape)
            totals.params += of_parameter
            totals.lr += of_parameter * told["lr"]
            totals.ckp1 += of_parameter * told.get("ckp1", 0.0)
            totals.numel += numel
            if holding.rule.averaged:
                square = sum(float(part.double().square().sum()) for part in here)
                totals.square += (1.0 - beta1) ** 2 * square
            if before is not None:
                sample, stored = before[number]
                live = sample.of(numbers) != 0
                now = map(sample.of, flat_tensors(holding.weight, piece))
                stays = torch.stack([a == b for a, b in zip(stored, now, strict=True)]).all(0)
                blocks = torch.stack([sample.per_block(live), sample.per_block(live & stays)]).cpu()
                self._stale[piece.part.name] += blocks
                totals.sampled += float(blocks[0].sum())
                totals.stale += float(blocks[1].sum())
            clipped, clippable = _clipped(holding, piece, told["step"])
            totals.clipped += of_parameter * clipped
            totals.clippable += of_parameter * clippable


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _sampled(holding: Holding, piece: Piece) -> tuple[Sample, tuple[Tensor, ...]]:
    """Numbers of the weight as it is stored: what forward sees, and the bits beside it."""
    sample = Sample(piece, holding.exp_avg_sq.device)
    return sample, tuple(sample.of(line) for line in flat_tensors(holding.weight, piece))


def _spread(live: Tensor, stale: Tensor) -> StaleBlocks:
    shares = stale[live > 0] / live[live > 0]  # copies of a block on several ranks cancel out
    return StaleBlocks(len(shares), float((shares == 1.0).double().mean()), float(shares.max()))


def _clipped(holding: Holding, piece: Piece, step: float) -> tuple[float, float]:
    """Share of the numbers here that clipping made smaller, and 1; 0 and 0 where nothing clips."""
    group = holding.group
    if group["clip"] != "block":
        return (0.0, 0.0) if holding.factor is None else (float(holding.factor < 1.0), 1.0)
    if piece.part.elementwise or not step:
        return 0.0, 0.0
    moments = holding.exp_avg_sq[piece.first_block : piece.first_block + piece.num_blocks]
    sums = holding.sums[piece.first_sum : piece.first_sum + piece.num_sums]
    denominator = root(moments / (1.0 - group["betas"][1] ** step)) + group["eps"]
    smaller = root(sums / piece.part.blocks.block_numel) > denominator
    clipped = numel = 0.0
    for section in sections(piece):
        first = section.first_block - piece.first_block
        blocks = smaller[first : first + section.num_blocks]
        numel += section.stop - section.start
        clipped += float(blocks.double().mean()) * (section.stop - section.start)
    return clipped / numel, 1.0


def _over_ranks(totals: dict[str, _Totals], stale: dict[str, Tensor]) -> dict[str, _Totals]:
    """Add up over the ranks: totals are returned, counts of blocks changed in place."""
    if not dist.is_initialized() or not totals:
        return totals
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    table = torch.tensor([astuple(one) for one in totals.values()], dtype=torch.float64)
    blocks = torch.stack([stale[name] for name in totals])
    both = torch.cat([table, blocks.flatten(1)], dim=1).to(device)
    dist.all_reduce(both)
    both, numbers = both.cpu(), table.shape[1]
    stale.update(zip(totals, both[:, numbers:].reshape(-1, 2, MOST_BLOCKS), strict=True))
    rows = both[:, :numbers].tolist()
    return {name: _Totals(*row) for name, row in zip(totals, rows, strict=True)}
