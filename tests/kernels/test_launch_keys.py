"""How often Triton compiles: once for all packs, whatever their sizes. Each new version costs a step of training up to
seconds, in which nobody knows what it waits for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

VERSIONS = {
    # by what a run's configuration decides: the draft's loss, top-p, and a shift's way back
    "shift._shift_kernel": 2,
    "sweeps_triton._gradient_kernel": 4,
    "sweeps_triton._overlap_kernel": 2,
    "sweeps_triton._stats_kernel": 2,
}


def test_no_kernel_is_compiled_again_for_another_number_of_rows() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("launch_keys.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    again = {name: _differences(keys) for name, keys in found.items() if len(keys) != VERSIONS.get(name, 1)}
    assert not again
    launched = Counter(name.split(".")[0] for name in found)
    assert launched == {"chain_attention": 2, "linear": 1, "logprob": 2, "shift": 3, "sweeps_triton": 5}


def _differences(keys: list[dict[str, str]]) -> dict[str, list[str]]:
    """What tells the keys of one kernel apart."""
    return {name: sorted({key[name] for key in keys}) for name in keys[0] if len({key[name] for key in keys}) > 1}
