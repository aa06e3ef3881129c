"""What the compiler makes of the sweeps for a GPU; the compiler needs none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from miles_spec.kernels.backend import interpreted
from miles_spec.kernels.sweeps import Stats, Sweeps

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
    for i, (argument, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        pointer = argument.endswith("_ptr")
        kind = POINTERS.get(argument, "*fp32") if pointer else "fp32" if argument == "scale" else "i32"
        if argument in constants:
            kind, constexprs[(i,)] = "constexpr", constants[argument]
        elif (pointer or argument in ("V", "w", "u")) and not parameter.do_not_specialize_on_alignment:
            aligned[(i,)] = [["tt.divisibility", 16]]
        signature[argument] = kind
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": sweeps.WARPS}).asm["ptx"]
    loop = [line for line in ptx.splitlines() if "cp.async.c" in line and "shared.global" in line]
    found[name] = {"wide": sum("0x10" in line for line in loop), "copies": len(loop)}
    found[name]["narrow"] = len(re.findall(r"(?:ld|st)[.]global[.\\w]*[.]b16", ptx))
print(json.dumps(found))
"""


def test_logits_are_loaded_sixteen_bytes_at_a_time() -> None:
    """Both blocks, several tiles ahead, however many rows there are; else a sweep takes twice its time. Only the few
    logits that are looked up one by one may be read by two bytes, and no gradient may be written so."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, counts in json.loads(done.stdout).items():
        assert counts["wide"] == counts["copies"] >= 8, (name, counts)
        assert counts["narrow"] == (4 if name == "stats" else 0), (name, counts)


@pytest.mark.skipif(not interpreted(), reason="Triton's interpreter is off")
@pytest.mark.parametrize("count", [1, 37, 48])
def test_columns_without_a_row_reach_nothing(count: int) -> None:
    """Loads do not stop at the last row: whatever is in memory beyond it must not be seen in any result, and its
    gradient is 0."""
    g = torch.Generator().manual_seed(count)
    blocks = torch.randn(2, 300, 64, generator=g)
    labels = torch.randint(0, 300, (count,), generator=g)
    factors, lse_t = torch.rand(4, count, generator=g), blocks[1].logsumexp(0)[:count]
    results = []
    for rubbish in (0.0, float("nan")):
        z, t = blocks.clone()
        z[:, count:] = t[:, count:] = rubbish
        sweeps = Sweeps(z, t, labels, scale=1.0, first=0, triton=True)
        stats = Stats.empty(count, z)
        sweeps.stats(stats, None)
        found = [stats.values, stats.ids, sweeps.overlap(stats.lse_z, lse_t), sweeps.mass_above(lse_t - 6, lse_t)]
        moved = found[2][1].clone()
        found.append(sweeps.gradient(stats, lse_t, factors, moved, "rejection", reverse=True))
        results.append([*found, z])
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results, strict=True))
    assert results[0][-1][:, :count].any(0).all() and not results[0][-1][:, count:].any()
