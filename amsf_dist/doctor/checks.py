"""The six questions, asked of a tiny model under the user's wrapper; every rank asks them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from amsf_dist.doctor import report
from amsf_dist.doctor.measures import counters_of, distance_from, place_between
from amsf_dist.doctor.model import TinyModel, batches
from amsf_dist.doctor.reference import Reference, gradients
from amsf_dist.doctor.report import FAILED, NOT_APPLICABLE, OK, Finding
from amsf_dist.doctor.setup import Setup
from amsf_dist.doctor.wrap import wrap
from amsf_dist.doctor.wrapped import Factory, OtherOptimizer, Wrapped
from amsf_dist.train.errors import one_line

__all__ = ["Examination"]

STEPS = 3
_MOST_TRIES = 60  # a loss scale of fp16 that starts too high skips that many steps at most


class Examination:
    """One process's part in examining one setup."""

    def __init__(
        self,
        setup: Setup,
        factory: Factory,
        folder: Path,
        device: torch.device,
        starts: Callable[[str], None],
        tells: Callable[[Finding], None],
    ) -> None:
        """Prepare to ask.

        Args:
            setup: which wrapper.
            factory: of the optimizer, called with a model or its parameters and AMSF's arguments.
            folder: for a checkpoint; the same for all ranks, and there.
            device: of this process.
            starts: called with a check before it begins.
            tells: called with the ranks' common answer.
        """
        self._setup, self._factory, self._folder, self._device = setup, factory, folder, device
        self._starts, self._tells = starts, tells
        self.findings: list[Finding] = []
        self._wrapped: Wrapped | None = None
        self._model = TinyModel(frozen=setup.freezes)
        self._steps_seen = 0
        self._trained = self._right = False

    def run(self) -> list[Finding]:
        """Ask in order; after a wrapper that cannot be built the rest is not applicable."""
        try:
            if self._ask(report.WRAPPER, self._build) and self._ask(
                report.OPTIMIZER, self._not_replaced
            ):
                self._ask(report.UPDATE, self._update)
                if self._trained:
                    self._ask(report.COUNTERS, self._counters)
                    self._ask(report.EVAL, self._eval)
                    self._ask(report.CHECKPOINT, self._checkpoint)
        finally:
            self._close()
        asked = {finding.check for finding in self.findings}
        for check in report.CHECKS:
            if check not in asked:
                self._tell(Finding(check, NOT_APPLICABLE, "what comes before it failed"))
        return self.findings

    def _ask(self, check: str, question: Callable[[], Finding]) -> bool:
        """Ask on all ranks; whether it makes sense to go on with the next question."""
        self._starts(check)
        try:
            mine = question()
        except OtherOptimizer as error:
            mine = Finding(report.OPTIMIZER, FAILED, one_line(error))
        except Exception as error:
            traceback.print_exc()  # to the process's log
            words = one_line(f"{type(error).__name__}: {error}", 300)
            mine = Finding(check, FAILED, f"{words} {_place_of(error)}")
        everyones: list[Finding] = [mine] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
        answer = report.worst(everyones)
        if answer.check != check:
            self._tell(Finding(check, NOT_APPLICABLE, "none was built"))
        self._tell(answer)
        return answer.status != FAILED

    def _tell(self, finding: Finding) -> None:
        self.findings.append(finding)
        self._tells(finding)

    def _close(self) -> None:
        if self._wrapped is not None:
            self._wrapped.close()
            self._wrapped = None

    @property
    def _patient(self) -> Wrapped:
        if self._wrapped is None:
            raise RuntimeError("there is no wrapper")
        return self._wrapped

    def _build(self) -> Finding:
        self._wrapped = wrapped = wrap(self._setup, self._factory, 0, self._device)
        text = f"{wrapped.name} ({wrapped.details})"
        return Finding(report.WRAPPER, OK, text, notes=wrapped.notes)

    def _not_replaced(self) -> Finding:
        found, expected = self._patient.optimizer, self._patient.expected
        name = type(found).__name__
        if found is expected or type(found) is expected:
            return Finding(report.OPTIMIZER, OK, name)
        wanted = expected.__name__ if isinstance(expected, type) else type(expected).__name__
        return Finding(report.OPTIMIZER, FAILED, f"{name} trains in place of {wanted}")

    def _update(self) -> Finding:
        wrapped = self._patient
        self._reference = Reference(self._model.to(self._device), wrapped.options)
        self._frozen = {
            name: param.detach().cpu()
            for name, param in self._model.named_parameters()
            if not param.requires_grad
        }
        wrapped.train()
        self._train(STEPS, self._reference)
        self._trained = True
        weights, compute = wrapped.weights(), wrapped.compute
        for name, value in self._frozen.items():
            if name in weights and not torch.equal(weights[name], value.to(weights[name].dtype)):
                return Finding(report.UPDATE, FAILED, f"{name} is frozen, and has moved")
        found = distance_from(weights, self._reference.y, self._reference, compute)
        self._right = found.is_rounding
        text = f"off by {found.error:.1e} of the way that {found.name} went; "
        text += f"rounding is at most {found.allowed:.0e}"
        return Finding(report.UPDATE, OK if self._right else FAILED, text, found.error)

    def _counters(self) -> Finding:
        reference = self._reference
        expected = {
            "step": reference.steps,
            "k": reference.steps,
            "lr_max": reference.lr_max,
            "weight_sum": reference.weight_sum,
        }
        found = counters_of(self._patient.optimizer)
        if not found:
            return Finding(report.COUNTERS, NOT_APPLICABLE, "the optimizer keeps none")
        worst, words = 0.0, []
        for key, values in found.items():
            worst = max(worst, *(abs(value / expected[key] - 1.0) for value in values))
            words.append(f"{key} {', '.join(f'{value:.4g}' for value in sorted(values))}")
        text = "; ".join(words)
        if worst <= 1e-6:
            return Finding(report.COUNTERS, OK, f"{text} after {reference.steps} steps", worst)
        wanted = "; ".join(f"{key} {expected[key]:.4g}" for key in found)
        return Finding(report.COUNTERS, FAILED, f"{text}; it should be {wanted}", worst)

    def _eval(self) -> Finding:
        wrapped, reference = self._patient, self._reference
        if not reference.averages:
            return Finding(report.EVAL, NOT_APPLICABLE, 'averaging="ema" evaluates where it trains')
        at_y = wrapped.weights()
        wrapped.eval()
        at_x = wrapped.weights()
        wrapped.train()
        back = wrapped.weights()
        compute = wrapped.compute
        place = place_between(at_y, at_x, reference)
        found = distance_from(at_x, reference.x, reference, compute)
        changed = sum(int((at_y[name] != back[name]).sum()) for name in at_y)
        text = f"{place:.3f} of the way from y to x"
        near = 1e-2 if compute.is_exact else 0.1
        if abs(place - 1.0) > (near if self._right else 0.5):  # of a wrong update, the direction
            return Finding(report.EVAL, FAILED, f"{text}, it should be 1", abs(place - 1.0))
        if changed:
            text = f"{text}, but {changed:,} numbers are not what they were before eval()"
            return Finding(report.EVAL, FAILED, text)
        text = f"{text}, off by {found.error:.1e} in {found.name}; y came back bit for bit"
        reached = found.is_rounding or not self._right  # an update that is wrong is wrong here too
        return Finding(report.EVAL, OK if reached else FAILED, text, found.error)

    def _checkpoint(self) -> Finding:
        wrapped, seen = self._patient, self._steps_seen
        wrapped.save(self._folder)
        dist.barrier()
        self._train(1)
        uninterrupted = wrapped.weights()
        self._close()
        self._wrapped = again = wrap(self._setup, self._factory, 1, self._device)
        again.load(self._folder)
        again.train()
        self._steps_seen = seen
        self._train(1)
        resumed = again.weights()
        differ = sum(int((resumed[name] != value).sum()) for name, value in uninterrupted.items())
        total = sum(value.numel() for value in uninterrupted.values())
        text = f"{differ:,} of {total:,} numbers differ one step after loading"
        return Finding(report.CHECKPOINT, FAILED if differ else OK, text, float(differ))

    def _train(self, steps: int, reference: Reference | None = None) -> None:
        """Train until so many steps were applied, the reference beside it.

        Raises:
            RuntimeError: the wrapper skipped one step after the other.
        """
        wrapped, rank, world_size = self._patient, dist.get_rank(), dist.get_world_size()
        mine, tries = wrapped.micro_batches, 0
        while steps:
            if tries == _MOST_TRIES:
                raise RuntimeError(f"the wrapper skipped {tries} steps: no gradient is finite")
            parts = batches(self._steps_seen, world_size * mine, self._device)
            grads: Mapping[str, Tensor] = {}
            if reference is not None:
                grads = gradients(self._model, reference.y, parts, wrapped.compute)
            applied = wrapped.step(parts[rank * mine : (rank + 1) * mine])
            if applied and reference is not None:
                reference.step(grads, wrapped.clip)
            self._steps_seen += 1
            tries, steps = (0, steps - 1) if applied else (tries + 1, steps)


def _place_of(error: Exception) -> str:
    """Where an error was raised: file and line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"({'/'.join(Path(last.filename).parts[-3:])}:{last.lineno})"
