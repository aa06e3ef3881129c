"""The digests of many tensors in one launch of Triton, as `digest` defines them.

Invariant: the host waits for nothing, and the result does not depend on how programs are scheduled: what they add to
one number are integers mod 2^64.

Each program takes one chunk of one tensor. What they have to know travels in one copy, and the numbers that they add to
lie in it too, as zeros. Dimensions: `T` tensors; `R` and `C` as in `digest`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

from miles_spec.kernels.backend import jit, tl
from miles_spec.sync.digest import COLUMNS, ROWS, row_weights

LANES, UNROLL = 4, 8
"""Rows that are read at a time by different threads, and after one another before the loop's next turn."""
WARPS = 8
"""A thread has four columns, so that it loads 16 bytes at a time."""
ENTRY = 4
"""Numbers of one tensor in the table: its digest, its address, its words, the first of its programs."""


@jit
def _mix(x):  # type: ignore[no-untyped-def]
    """splitmix64's finalizer, of uint64, whose shifts are logical."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@jit
def _add(low, high, words, weight_ptrs):  # type: ignore[no-untyped-def]
    """Adds words times weights in halves, 32 by 32 bits: two instructions a word."""
    low += words.to(tl.int64) * tl.load(weight_ptrs).to(tl.int64)
    more = tl.mul(words, tl.load(weight_ptrs + 1), sanitize_overflow=False)
    return low, tl.add(high, more, sanitize_overflow=False)


@jit
def _digest_kernel(  # type: ignore[no-untyped-def]
    table_ptr,
    owners_ptr,
    weights_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    ENTRY: tl.constexpr,
):
    """A chunk's column sums, mixed, weighted and added to its tensor's digest."""
    program = tl.program_id(0)
    entry_ptr = table_ptr + tl.load(owners_ptr + program) * ENTRY
    words_ptr = tl.load(entry_ptr + 1).to(tl.pointer_type(tl.int32))
    if ALIGNED:
        words_ptr = tl.multiple_of(words_ptr, 16)
    chunk = program - tl.load(entry_ptr + 3)
    start = chunk * (ROWS * COLUMNS)
    count = tl.minimum(tl.load(entry_ptr + 2) - start, ROWS * COLUMNS).to(tl.int32)
    columns = tl.arange(0, COLUMNS)
    lanes = tl.arange(0, LANES)[:, None]
    offsets = lanes * COLUMNS + columns[None, :]
    words_ptrs = words_ptr + start + offsets
    weights_ptrs = weights_ptr + lanes * 2
    low = tl.zeros([LANES, COLUMNS], tl.int64)
    high = tl.zeros([LANES, COLUMNS], tl.int32)
    whole = count // (LANES * UNROLL * COLUMNS) * (LANES * UNROLL)
    for row in range(0, whole, LANES * UNROLL):
        for more in tl.static_range(0, LANES * UNROLL, LANES):
            words = tl.load(words_ptrs + (row + more) * COLUMNS)
            low, high = _add(low, high, words, weights_ptrs + (row + more) * 2)
    for row in range(whole, tl.cdiv(count, COLUMNS), LANES):
        words = tl.load(words_ptrs + row * COLUMNS, mask=row * COLUMNS + offsets < count, other=0)
        low, high = _add(low, high, words, weights_ptrs + row * 2)
    sums = tl.sum(low + (high.to(tl.int64) << 32), 0)
    index = (chunk * COLUMNS + columns + ((1 << 40) + 1)).to(tl.uint64)
    weights = _mix(index * 0x9E3779B97F4A7C15) | 1
    terms = _mix(sums.to(tl.uint64, bitcast=True)) * weights
    tl.atomic_add(entry_ptr, tl.sum(terms.to(tl.int64, bitcast=True)), sem="relaxed")


@cache
def _halves(device: torch.device) -> Tensor:
    """`[2 R]` int32: the weights of rows as `low + 2^32 high`, both with a sign."""
    weights = row_weights(device)
    return (weights + ((weights & 1 << 31) << 1)).view(torch.int32)


def launch(places: Iterable[tuple[int, int]], device: torch.device) -> Tensor:
    """`[T]` int64 on `device`: the numbers of tensors given by their addresses there, multiples of 4, and their words.

    The memory is read on the device's current stream; what is queued there later may overwrite it.
    """
    entries = array("q")
    # of programs, their tensors: first those that load 16 bytes at a time, then those that cannot
    aligned, odd = array("q"), array("q")
    for index, (address, words) in enumerate(places):
        owners = odd if address % 16 else aligned
        entries.extend((0, address, words, len(owners)))
        owners.extend(array("q", (index,)) * -(-words // (ROWS * COLUMNS)))
    # each part starts at a multiple of 16 bytes, or the kernel would be compiled once more
    first = entries + aligned + array("q", (0,)) * (len(aligned) % 2)
    host = torch.frombuffer(first + odd, dtype=torch.int64)
    on_gpu = device.type == "cuda"
    table = (host.pin_memory() if on_gpu else host).to(device, non_blocking=True)
    with torch.cuda.device(device) if on_gpu else nullcontext():
        for owners, start in ((aligned, len(entries)), (odd, len(first))):
            if owners:
                _digest_kernel[(len(owners),)](
                    table,
                    table[start:],
                    _halves(device),
                    ROWS=ROWS,
                    COLUMNS=COLUMNS,
                    ALIGNED=owners is aligned,
                    LANES=LANES,
                    UNROLL=UNROLL,
                    ENTRY=ENTRY,
                    num_warps=WARPS,
                )
    return table[: len(entries) : ENTRY]
