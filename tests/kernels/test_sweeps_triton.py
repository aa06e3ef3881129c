"""What the compiler makes of the sweeps for a GPU; the compiler needs none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from miles_spec.kernels import sweeps_triton as sweeps

POINTERS = {"z_ptr": "*bf16", "t_ptr": "*bf16", "labels_ptr": "*i64", "ids_ptr": "*i64"}
found = {}
for name in ("stats", "overlap", "gradient"):
    kernel = getattr(sweeps, f"_{name}_kernel")
    tall, wide = sweeps.TILES[name]
    constants = dict(
        BORDER=False, REVERSE=False, RULE=0, PART=sweeps.PART, BLOCK_V=tall, BLOCK_N=wide, STAGES=sweeps.STAGES
    )
    signature, constexprs, aligned = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        pointer = argument.endswith("_ptr")
        kind = POINTERS.get(argument, "*fp32") if pointer else "fp32" if argument == "scale" else "i32"
        if argument in constants:
            kind, constexprs[(i,)] = "constexpr", constants[argument]
        elif pointer or argument in ("V", "n", "w", "u"):
            aligned[(i,)] = [["tt.divisibility", 16]]
        signature[argument] = kind
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": sweeps.WARPS}).asm["ptx"]
    loop = [line for line in ptx.splitlines() if "cp.async.c" in line and "shared.global" in line]
    found[name] = {"wide": sum("0x10" in line for line in loop), "copies": len(loop)}
    found[name]["narrow"] = len(re.findall(r"ld[.]global[.\\w]*[.]b16", ptx))
print(json.dumps(found))
"""


def test_logits_are_loaded_sixteen_bytes_at_a_time() -> None:
    """Both blocks, several tiles ahead; else a sweep takes twice its time. Only the few logits that are looked up one
    by one may be read by two bytes."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, counts in json.loads(done.stdout).items():
        assert counts["wide"] == counts["copies"] >= 8, (name, counts)
        assert counts["narrow"] == (4 if name == "stats" else 0), (name, counts)
