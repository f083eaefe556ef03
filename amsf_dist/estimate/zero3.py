"""A step under ZeRO-3, on paper.

deepspeed/runtime/zero/stage3.py and partitioned_param_coordinator.py (0.19.8), once the order of
modules has been traced; one parameter group, no offload.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence

from amsf_dist.estimate.buffers import Buffers
from amsf_dist.estimate.ledger import Ledger
from amsf_dist.estimate.moments import BYTES, blocks_of, in_interval
from amsf_dist.estimate.recipe import Recipe
from amsf_dist.estimate.structure import Structure, Weight
from amsf_dist.estimate.zero import MASTER

__all__ = ["zero3"]


def zero3(
    structure: Structure, recipe: Recipe, gpus: int, buffers: Buffers, on_cpu: bool = False
) -> Ledger:
    """A step on the first rank.

    The model has `recipe.compute`, the optimizer fp32 weights. One micro-batch a step.

    Args:
        structure: of the model.
        recipe: of the optimizer.
        gpus: ranks.
        buffers: of DeepSpeed.
        on_cpu: DeepSpeed keeps a second copy of fp32 weights there; on a GPU it has one for both.
    """
    size = recipe.compute.itemsize
    held = [-(-weight.numel // gpus) for weight in structure.weights]
    part = sum(held)
    lines = {owner: line(part) for owner, line in recipe.lines.items()}
    parts = blocks_of(structure, recipe)
    if parts is not None:
        lines["v"] = BYTES * sum(in_interval(p, 0, n) for p, n in zip(parts, held, strict=True))
    ledger = Ledger(
        {
            "weights": part * size,
            "masters": part * MASTER if size != MASTER or on_cpu else 0,
            "gradients": part * size,
            "reduced": buffers.reduce_bucket * size,
            **lines,
        }
    )
    _Passes(structure, size, buffers, ledger).run()
    for numel in _sub_groups(held, buffers.sub_group):  # flattened, then made fp32
        flat = ledger.take("gradients", numel * size)
        wide = ledger.take("gradients", numel * MASTER) if size != MASTER else 0
        ledger.give("gradients", flat + wide)
    return ledger


def _sub_groups(held: Sequence[int], most: int) -> Iterator[int]:
    """Numbers of the groups that step one after another."""
    filled = 0
    for numel in held:
        filled += numel
        if filled >= most:
            yield filled
            filled = 0
    if filled:
        yield filled


class _Gathered:
    """Weights on their way from one all-gather: in a buffer, out of which each is copied."""

    def __init__(self, weights: Collection[Weight], passes: _Passes) -> None:
        self._weights, self._passes = weights, passes
        self._waiting = set(weights)
        self._copied = len(weights) == 1  # a single one is taken as it comes
        passes.take(weights)

    def wait(self, weight: Weight) -> None:
        """The first wait copies all; the buffer is freed when all have been waited for."""
        if not self._copied:
            self._passes.take(self._weights)
            self._copied = True
        self._waiting.discard(weight)
        if not self._waiting and len(self._weights) > 1:
            self._passes.free(self._weights)


class _Passes:
    """Forward and backward: weights are fetched module by module, some ahead, and let go."""

    def __init__(self, structure: Structure, size: int, buffers: Buffers, ledger: Ledger) -> None:
        self._size, self._buffers, self._ledger = size, buffers, ledger
        # the model itself comes first both ways, and by then the first weights are sent for
        self._trace = [(), *structure.calls, (), *reversed(structure.calls)]
        self._backward = len(structure.calls) + 1
        self._queue = deque((weight, at) for at, call in enumerate(self._trace) for weight in call)
        self._last_use = dict(self._queue)
        self._fetched_for: dict[Weight, int] = {}  # the latest use that a fetch has seen to
        self._persistent = {w for w in structure.weights if w.numel <= buffers.persistent}
        self._here = set(self._persistent)
        self._coming: dict[Weight, _Gathered] = {}
        self._live = 0
        self._bucket: list[Weight] = []

    def run(self) -> None:
        """From the first module forward to the first module backward."""
        self.take(self._persistent)
        for at, call in enumerate(self._trace):
            self._fetch(at, call)
            if at >= self._backward:
                for weight in reversed(call):
                    if self._last_use[weight] == at:
                        self._reduce(weight)
            self._release(at, call)
        self._flush()
        self.free(self._persistent)

    def take(self, weights: Collection[Weight]) -> None:
        """Allocate whole weights."""
        self._ledger.take("gathered", _numel(weights) * self._size)

    def free(self, weights: Collection[Weight]) -> None:
        """Free them."""
        self._ledger.give("gathered", _numel(weights) * self._size)

    def _fetch(self, at: int, call: Sequence[Weight]) -> None:
        """What the module needs now, then what the next ones will need."""
        self._gather([weight for weight in call if self._away(weight)])
        for weight in call:
            if weight in self._coming:
                self._coming.pop(weight).wait(weight)
                self._here.add(weight)
        unseen = {weight for weight in call if self._fetched_for.get(weight, -1) < at}
        while unseen:
            weight, self._fetched_for[weight] = self._queue[0]
            unseen.discard(self._queue.popleft()[0])
        room = min(self._buffers.live - self._live, self._buffers.prefetch)
        ahead: dict[Weight, None] = {}
        while self._queue and _numel(ahead) < room:
            weight, use = self._queue.popleft()
            self._fetched_for[weight] = max(self._fetched_for.get(weight, -1), use)
            if self._away(weight):
                ahead[weight] = None
        self._gather(list(ahead))

    def _away(self, weight: Weight) -> bool:
        return weight not in self._here and weight not in self._coming

    def _gather(self, weights: Sequence[Weight]) -> None:
        if weights:
            self._coming |= dict.fromkeys(weights, _Gathered(weights, self))
            self._live += _numel(weights)

    def _release(self, at: int, call: Sequence[Weight]) -> None:
        """Free what no fetch counts on and no module needs again soon."""
        soon: set[Weight] = set()
        passed = 0
        for later in self._trace[at + 1 :]:
            if passed >= self._buffers.reuse:
                break
            soon.update(later)
            passed += _numel(later)
        for weight in call:
            kept = weight in self._persistent or weight in soon
            if not kept and self._fetched_for[weight] <= at + 1:
                self.free([weight])
                self._here.remove(weight)
                self._live -= weight.numel

    def _reduce(self, weight: Weight) -> None:
        """Move a gradient into the bucket, which is reduced when the next one does not fit."""
        self._ledger.take("reduced", weight.numel * self._size)
        filled = _numel(self._bucket)
        if filled and filled + weight.numel > self._buffers.reduce_bucket:
            self._flush()
        if weight.numel <= self._buffers.reduce_bucket:
            self._ledger.give("reduced", weight.numel * self._size)
        self._bucket.append(weight)

    def _flush(self) -> None:
        """Reduce-scatter a copy; a gradient that is larger than the bucket was not in it."""
        copy = self._ledger.take("reduced", _numel(self._bucket) * self._size)
        large = [weight for weight in self._bucket if weight.numel > self._buffers.reduce_bucket]
        self._ledger.give("reduced", copy + _numel(large) * self._size)
        self._bucket = []


def _numel(weights: Collection[Weight]) -> int:
    return sum(weight.numel for weight in weights)
