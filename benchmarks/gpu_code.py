"""Compile the Triton kernels for an H100 and H200, without one, and count their instructions.

    python benchmarks/gpu_code.py [--json]

What a streaming multiprocessor has to issue per number bounds a kernel as memory does: at 1.75 GHz
an H200 issues 30e12 instructions of single threads a second, and at 4.8 TB/s it moves 480e9 numbers of
10 bytes, 62 for each. Counted is the machine code, all of it: what is skipped (slow ways of roots,
blocks that begin within a tile) counts too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from amsf_dist.kernels.triton import measure, moments, move
from amsf_dist.kernels.triton.columns import COLUMNS

POINTERS = {
    **dict.fromkeys(("items", "pieces", "addresses"), "*i64"),
    **dict.fromkeys(("coefficients", "factors", "scales"), "*fp32"),
    **{"steps": "*fp64", "verdict": "*i1"},
}
NUMBERS_PER_THREAD = 16
TILE = {"TILES": 16, "GROUPS": 32}
USUAL = {"RULE": "schedule_free", "DECAY_ALL": True, "CLIP_BLOCKS": False}
STORAGES = [("plain", "fp32"), ("split8", "bf16"), ("stochastic", "bf16")]
KINDS = [(True, False), (False, False), (False, True)]  # elements, blocks, rows and columns
OTHERS = [("split16", "bf16"), ("kahan", "bf16"), ("split8", "fp16")]


def compiled(kernel: Any, warps: int = 4, **constants: Any) -> dict[str, Any]:
    """What the compiler made of a kernel."""
    signature = {name: POINTERS.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if name in POINTERS
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = done.asm["ptx"]
    wide = [line for line in ptx.splitlines() if "global.v4.b32" in line]
    return {
        "kernel": kernel.fn.__name__,
        "instructions": instructions(done.asm["cubin"]),
        "loads": sum("ld.global" in line for line in wide),
        "stores": sum("st.global" in line for line in wide),
        "local": "ld.local" in ptx,
        **constants,
    }


def instructions(cubin: bytes) -> int | None:
    """How many there are; None: Triton came without a disassembler."""
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not disassembler.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ran = subprocess.run(
            [disassembler, "-c", file.name], capture_output=True, text=True, check=True
        )
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", ran.stdout, re.MULTILINE))


def kernels() -> list[dict[str, Any]]:
    """All that matter, and what is rare once each."""
    found = []
    for storage, form in STORAGES + OTHERS:
        for line in ("fp32", "bf16", "int8") if (storage, form) in STORAGES else ("int8",):
            for element, factored in KINDS if (storage, form) in STORAGES else KINDS[:2]:
                blocks = {"ELEMENT": element, "FACTORED": factored, "WHOLE": not element}
                what = {"STORAGE": storage, "FORMAT": form, "LINE": line, "GRADIENT": form}
                options = {**USUAL, **TILE, **what, **blocks, "BY_BLOCK": False, "ALIGNED": True}
                found.append(compiled(move.move, **options))
    rare = {**found[-1], "RULE": "ema", "DECAY_ALL": False, "CLIP_BLOCKS": True, "BY_BLOCK": True}
    rare.update(ELEMENT=False, WHOLE=False, ALIGNED=False, STORAGE="split8", FORMAT="bf16")
    rare.update(GRADIENT="bf16")
    names = move.move.arg_names
    found.append(compiled(move.move, **{key: rare[key] for key in rare if key in names}))
    low = {"STORAGE": "split8", "FORMAT": "bf16", "LINE": "int8", "GRADIENT": "bf16"}
    found.append(compiled(move.measure_and_move, **USUAL, **TILE, **low, ALIGNED=True))
    for rows in (1, 8):
        shape = {"ROWS": rows, "COLUMNS": 2048 // rows}
        found.append(compiled(measure.measure, GRADIENT="bf16", ALIGNED=True, **shape))
    columns = {"ROWS": 2048 // COLUMNS, "COLUMNS": COLUMNS}
    found.append(compiled(measure.measure_columns, GRADIENT="bf16", ALIGNED=True, **columns))
    found.append(compiled(measure.add_columns, COLUMNS=COLUMNS))
    found.append(compiled(measure.add_parts, NUMBERS=2048))
    blocks = {"CLIP_BLOCKS": False, "BY_BLOCK": True, "BLOCKS": 128}
    found.append(compiled(moments.advance_moments, warps=1, **blocks))
    clips = {**blocks, "CLIP_BLOCKS": True}
    found.append(compiled(moments.advance_matrices, warps=1, **clips))
    return found


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    asked = parser.parse_args()
    found = kernels()
    if asked.json:
        print(json.dumps(found))
        return
    print("| weights | line | blocks | instructions per number |\n|---|---|---|---|")
    for one in found:
        if one["kernel"] == "move" and one["ALIGNED"] and one["instructions"]:
            blocks = "elements" if one["ELEMENT"] else "whole groups of 64"
            blocks = "rows and columns" if one["FACTORED"] else blocks
            per_number = one["instructions"] / NUMBERS_PER_THREAD
            weights = f"{one['STORAGE']} {one['FORMAT']}"
            print(f"| {weights} | {one['LINE']} | {blocks} | {per_number:.0f} |")


if __name__ == "__main__":
    main()
