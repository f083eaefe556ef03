"""What the doctor says: one line a check, and what to do about those that failed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = [
    "CHECKS",
    "FAILED",
    "NOT_APPLICABLE",
    "OK",
    "Finding",
    "Report",
    "ending",
    "row",
    "worst",
]

OK, FAILED, NOT_APPLICABLE = "ok", "FAILED", "not applicable"

WRAPPER = "wrapper chosen"
OPTIMIZER = "optimizer not replaced"
UPDATE = "update right"
COUNTERS = "counters right"
EVAL = "eval weights reach the model"
CHECKPOINT = "checkpoint round trip"
CHECKS = (WRAPPER, OPTIMIZER, UPDATE, COUNTERS, EVAL, CHECKPOINT)

_CURES = {
    WRAPPER: "change what the message names; the same would stop your training",
    OPTIMIZER: 'name it in the DeepSpeed configuration, "optimizer": {"type": "AMSF", "params": '
    '{...}}; or, to hand it over, name none there and set "zero_force_ds_cpu_optimizer": false',
    UPDATE: "do not train like this: another ZeRO stage, or FSDP2, may be right. If the optimizer "
    "is AMSF it is a bug: please report it with this table and the configuration",
    COUNTERS: "warm-up, averaging and bias correction run at another speed than you set: ZeRO-3 "
    "calls step() once for every sub-group, so count per tensor, as AMSF does",
    EVAL: "what is evaluated and saved are not the averaged weights: the optimizer must see the "
    "engine's partitions and gather the model's weights anew, as AMSF's eval() does",
    CHECKPOINT: "a resumed run will not go on as this one would have: do not rely on its "
    "checkpoints. If the optimizer is AMSF it is a bug: please report it with this table",
}


@dataclass(frozen=True)
class Finding:
    """The answer to one check.

    Attributes:
        check: one of `CHECKS`.
        status: `OK`, `FAILED` or `NOT_APPLICABLE`.
        text: what was seen or measured.
        number: the measured number, where there is one; larger is worse.
        notes: what the trial did otherwise than the configuration says.
    """

    check: str
    status: str
    text: str
    number: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def cure(self) -> str:
        """What to do, if it failed."""
        return _CURES[self.check] if self.status == FAILED else ""


def _finite(number: float | None) -> float | None:
    """JSON knows no infinity."""
    return number if number is not None and math.isfinite(number) else None


def worst(findings: Sequence[Finding]) -> Finding:
    """Of what the ranks say about one check: a failure if there is one, else the largest number."""
    order = (NOT_APPLICABLE, OK, FAILED)
    return max(findings, key=lambda f: (order.index(f.status), f.number or 0.0))


@dataclass(frozen=True)
class Report:
    """All answers.

    Attributes:
        title: what was examined, and where.
        findings: one per check, in order.
        log: the last lines of a process that died, or did not come back.
    """

    title: str
    findings: tuple[Finding, ...]
    log: str = ""

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(finding.status != FAILED for finding in self.findings)

    def __str__(self) -> str:
        """The table."""
        rows = [line for finding in self.findings for line in row(finding)]
        return "\n".join([self.title, "", *rows, *ending(self)])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        findings = [
            {**asdict(finding), "number": _finite(finding.number), "cure": finding.cure}
            for finding in self.findings
        ]
        return {**asdict(self), "findings": findings, "healthy": self.healthy}


def row(finding: Finding) -> list[str]:
    """The lines of one check."""
    lines = [f"{finding.check:<30}{finding.status:<16}{finding.text}"]
    if finding.cure:
        lines.append(f"{'':<30}{'cure:':<16}{finding.cure}")
    return lines


def ending(report: Report) -> list[str]:
    """The lines below the table."""
    lines = [""] + [
        f"for the trial: {note}" for finding in report.findings for note in finding.notes
    ]
    if report.log:
        lines += ["", report.log, ""]
    failed = sum(finding.status == FAILED for finding in report.findings)
    return [*lines, "healthy" if report.healthy else f"{failed} of {len(CHECKS)} checks FAILED"]
