"""Where a number comes from: the commit, the hardware and the versions that every committed result names.

Invariant: only what was read off the machine is said; what cannot be read is None.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "sglang",
    "megatron-core",
    "reasoning-gym",
    "liger-kernel",
    "flash-linear-attention",
    "cut-cross-entropy",
)


def commit() -> str | None:
    """The commit this code is at, with `+changes` if tracked files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(Path(__file__).resolve()))  # installed inside another checkout it fails
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores, and GPUs."""
    import torch

    model = None
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "gpus": gpus,
    }


def versions() -> dict[str, str]:
    """Python and the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def check(what: str, value: float | None, goal: str, holds: bool) -> dict[str, Any]:
    """One line of a result's `checks`."""
    return {"what": what, "value": value, "goal": goal, "holds": holds}


def write_result(
    path: Path, name: str, rows: Sequence[Mapping[str, Any]], checks: Sequence[Mapping[str, Any]], **more: Any
) -> None:
    """Writes a benchmark's result with where it comes from."""
    result = {
        "name": name,
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        **more,
        "rows": list(rows),
        "checks": list(checks),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
