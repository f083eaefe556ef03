"""convergence.md and convergence.png, from the record and from findings.md, which people write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.convergence import record, table
from benchmarks.convergence.chart import draw
from benchmarks.convergence.plan import COMPARED, IN_PICTURE, REFERENCE, SETS, WHY
from benchmarks.convergence.setting import STEPS

__all__ = ["write"]

FINDINGS = Path(__file__).resolve().parent / "findings.md"


def write(path: Path) -> list[Path]:
    """Write both beside the record.

    Args:
        path: the record, with at least the run of the reference.

    Returns:
        The files written.
    """
    records = record.read(path)
    compared = table.rows(records, COMPARED)
    page = "\n\n".join(
        [
            "# Convergence: the same model, seeds and batches for every optimizer",
            _circumstances(records),
            FINDINGS.read_text().strip(),
            "![Held-out loss](convergence.png)",
            "## The comparison",
            _READING.format(reference=REFERENCE),
            table.comparison(compared, REFERENCE),
            "## What was tried to choose the numbers",
            "Held-out loss is what the numbers were chosen by, for every optimizer alike: it compares them, "
            "and is a little low for all.",
            *(
                f"### {word}\n\n{WHY[word]}\n\n{table.trials(found)}"
                for word, settings in SETS.items()
                if word in WHY and (found := table.rows(records, settings))
            ),
        ]
    )
    target = path.with_suffix(".md")
    target.write_text(page + "\n")
    pictured = [row for row in compared if row.setting.name in IN_PICTURE]
    return [target, draw(pictured, compared, path.with_suffix(".png"))]


def _circumstances(records: list[dict[str, Any]]) -> str:
    one = [r for r in records if r["steps"] == STEPS]
    hardware = "; ".join(sorted({r["hardware"] for r in one}))
    texts = ", ".join(sorted({r["text"] for r in one}))
    versions: dict[str, set[str]] = {}
    for r in one:
        for package, version in r["versions"].items():
            versions.setdefault(package, set()).add(version)
    said = ", ".join(f"{package} {'/'.join(sorted(v))}" for package, v in versions.items())
    return _ABOUT.format(
        steps=STEPS, hardware=hardware, versions=said, texts=texts, parameters=one[-1]["parameters"]
    )


_ABOUT = """\
    python -m benchmarks.convergence run final     # what is in convergence.jsonl already is not run again
    python -m benchmarks.convergence report

A Llama of {parameters:,} parameters (width 128, 3 layers, 4 heads) reads CPython's documentation and standard library byte by
byte: {steps:,} steps of 16 x 128, none of it twice, weight decay 0.1 on matrices. A seed sets initial weights and the order of the
data, the same for every optimizer. Every 29th page or module is held out, and no held-out paragraph shares 64 characters with a
training paragraph (text {texts}; another version of Python has another). The loss is over the same 512 held-out windows for
all, at the average x for the schedule-free ones. Arithmetic is the same for all: fp32, matrix products on bf16 operands.
Settings with bf16 weights keep what the optimizer really stores; their forward reads these weights, and their gradients
are rounded to bf16.

{hardware}. {versions}."""

_READING = """\
Loss in nats per byte. Spread: standard deviation over the seeds. Bytes: distinct storages of weights and optimizer state,
counted after the run, per parameter; error bits count as state, gradients not at all. The column to {reference}: mean (lowest .. highest) of the relative
difference at equal seeds. Seconds: processor time of a run, the model's included, on CPU with our reference kernel; not a
measure of speed."""
