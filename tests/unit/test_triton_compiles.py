"""The Triton kernels compile for an H100 and H200, which needs no GPU; and threads read 16 bytes.

In a process of its own: Triton has either its compiler or its interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from amsf_dist.kernels.triton import measure, move

POINTERS = {
    "items": "*i64", "pieces": "*i64", "addresses": "*i64", "coefficients": "*fp32",
    "factors": "*fp32", "steps": "*fp64", "verdict": "*i1", "scales": "*fp32",
}

def compiled(kernel, warps=4, **constants):
    names = kernel.arg_names
    signature = {name: POINTERS.get(name, "constexpr") for name in names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in POINTERS}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = done.asm["ptx"]
    wide = [line for line in ptx.splitlines() if "global.v4.b32" in line]
    found.append({
        "loads": sum("ld.global" in line for line in wide),
        "stores": sum("st.global" in line for line in wide),
        "local": "ld.local" in ptx,
        **constants,
    })

found = []
shape = {"TILES": 16, "GROUPS": 32}
same = {"RULE": "schedule_free", "DECAY_ALL": True, "CLIP_BLOCKS": False, "BY_BLOCK": False}
for weight, form in (("plain", "fp32"), ("split8", "bf16"), ("split16", "bf16"),
                     ("kahan", "bf16"), ("stochastic", "bf16"), ("split8", "fp16")):
    for line in ("fp32", "bf16", "int8"):
        if (weight in ("split16", "kahan") or form == "fp16") and line != "int8":
            continue
        for element in (False, True):
            compiled(move.move, STORAGE=weight, FORMAT=form, LINE=line, ELEMENT=element,
                     GRADIENT=form, ALIGNED=True, **same, **shape)
options = {**same, "RULE": "ema", "DECAY_ALL": False, "CLIP_BLOCKS": True, "BY_BLOCK": True}
compiled(move.move, STORAGE="split8", FORMAT="bf16", LINE="int8", ELEMENT=False,
         GRADIENT="bf16", ALIGNED=False, **options, **shape)
fused = {name: same[name] for name in ("RULE", "DECAY_ALL", "CLIP_BLOCKS")}
compiled(move.measure_and_move, STORAGE="split8", FORMAT="bf16", LINE="int8", GRADIENT="bf16",
         ALIGNED=True, **fused, **shape)
for rows in (1, 8):
    compiled(measure.measure, GRADIENT="bf16", ROWS=rows, COLUMNS=2048 // rows, ALIGNED=True)
compiled(measure.add_parts, NUMBERS=2048)
compiled(measure.advance_moments, warps=1, CLIP_BLOCKS=False, BY_BLOCK=True, BLOCKS=128)
print(json.dumps(found))
"""


def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=280
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    kernels = json.loads(ran.stdout)
    assert len(kernels) > 20
    for kernel in kernels:
        assert not kernel["local"], f"registers spill: {kernel}"
        if kernel.get("ALIGNED"):
            assert kernel["loads"], kernel
