"""Draw what each GPU holds by optimizer: docs/memory.png. A prediction, nothing is trained.

    python benchmarks/memory.py [OUT.png]

The prediction is checked against real runs in tests/equal/test_memory.py; see docs/memory.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from amsf_dist.train.estimate import COLUMNS, Estimate, estimate

GIGABYTE = 1e9
COLORS = {
    "weights": "#264653",
    "beside": "#4f7f91",
    "state": "#e9a03b",
    "v": "#9c2c2c",
    "gradients": "#8ab6c1",
    "gathered": "#c9cdd1",
    "reduced": "#e2e4e6",
}
LABELS = {
    "weights": "weights",
    "beside": "error bits",
    "state": "first moment, or gap",
    "v": "second moment",
    "gradients": "gradients",
    "gathered": "gathered weights",
    "reduced": "gradients being reduced",
}


def draw(found: Estimate, title: str, out: Path) -> None:
    figure = Figure(figsize=(9.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    names = [row.name for row in found.rows]
    left = [0.0] * len(names)
    for column, owners in COLUMNS.items():
        sizes = [sum(row.owners.get(o, 0) for o in owners) / GIGABYTE for row in found.rows]
        if max(sizes) < 0.01 * max(row.total for row in found.rows) / GIGABYTE:
            continue
        axis.barh(names, sizes, left=left, height=0.66, color=COLORS[column], label=LABELS[column])
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    for place, row in enumerate(found.rows):
        axis.text(left[place] + 0.15, place, f"{row.total / GIGABYTE:.1f} GB", va="center")
    axis.invert_yaxis()
    axis.set(title=title, xlabel="GB on each GPU at the fullest moment of a step, no activations")
    axis.margins(x=0.09)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[1] / "docs" / "memory.png"
    parser.add_argument("out", nargs="?", type=Path, default=default)
    out = parser.parse_args().out
    found = estimate("llama-3.1-8b", engine="fsdp2", gpus=8, dtype="bf16")
    print(found)
    draw(found, "Llama-3.1-8B, FSDP2 on 8 GPUs, bf16 arithmetic", out)
    print(f"wrote {out} ({out.stat().st_size // 1000} kB)")


if __name__ == "__main__":
    main()
