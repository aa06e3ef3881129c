"""Which code computes a kernel: Triton's, or the plain torch it is tested against.

Invariant: nobody gets a slower path than they asked for without being told. `auto` is Triton on a GPU and the reference
elsewhere; where a GPU lacks Triton, the log says so once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any, Literal, overload

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


@overload
def jit(kernel: Callable[..., Any]) -> Any: ...


@overload
def jit(*, varying: Sequence[str]) -> Callable[[Callable[..., Any]], Any]: ...


def jit(kernel: Callable[..., Any] | None = None, *, varying: Sequence[str] = ()) -> Any:
    """`triton.jit`; without Triton the function as it is, which nobody then calls.

    `varying` names arguments whose values, or addresses, follow the number of rows. Triton compiles a kernel again for
    a number that is 1 or a multiple of 16, and for an address that is a multiple of 16: seconds in the middle of a run,
    whenever a pack has a new kind of size. Of these it does not.
    """
    if kernel is None:
        return partial(jit, varying=varying)
    if triton is None:
        return kernel
    return triton.jit(kernel, do_not_specialize=varying, do_not_specialize_on_alignment=varying)


@cache
def _note_missing() -> None:
    log.warning("triton is not installed: kernels on the GPU run as plain torch, several times slower")
