"""Which code computes a kernel: Triton's, or the plain torch it is tested against.

Invariant: nobody gets a slower path than they asked for without being told. `auto` is Triton on a GPU and the reference
elsewhere; where a GPU lacks Triton, the log says so once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Literal

from torch import Tensor


def _optional(name: str) -> Any:
    """The module, or None where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        return None


triton = _optional("triton")
tl = _optional("triton.language")

Backend = Literal["auto", "reference", "triton"]

log = logging.getLogger(__name__)


def use_triton(backend: Backend, like: Tensor) -> bool:
    """Whether `backend` means Triton for tensors that lie where `like` does.

    Raises `ValueError` for `triton` where it cannot run: not installed, or on a CPU without its interpreter.
    """
    if backend == "auto":
        if like.is_cuda and triton is None:
            _note_missing()
        return like.is_cuda and triton is not None
    if backend == "triton":
        if triton is None:
            raise ValueError("backend='triton' needs the package triton: pip install 'miles-spec[gpu]'")
        if not like.is_cuda and not interpreted():
            raise ValueError("backend='triton' needs tensors on a GPU, or TRITON_INTERPRET=1 before the first import")
        return True
    return False


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton the function as it is, which nobody then calls."""
    return kernel if triton is None else triton.jit(kernel)


@cache
def _note_missing() -> None:
    log.warning("triton is not installed: kernels on the GPU run as plain torch, several times slower")
