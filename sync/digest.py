"""Digests of tensors: what a trainer sent and an engine serves are compared by these.

Invariant: a digest depends on dtype, shape and the bytes in row-major order alone, not on device or strides.

The bytes are read as words `w` of 32 bits, the last one padded with zeros, in rows of `ROW_WORDS`:

    row sum   s_r = sum_j w_rj * a_j          mod 2^64
    digest    h   = sum_r mix(s_r) * b_r      mod 2^64

with fixed pseudo-random odd weights `a`, `b` and splitmix64's `mix`, a bijection of 64-bit integers.

- One changed word is always noticed: its difference `d` has `0 < |d| < 2^32`, and an odd weight is invertible mod 2^64,
  so `d * a_j != 0` and that one row sum differs; `mix` is a bijection and `b_r` odd, so `h` differs. A flipped bit or
  byte is such a change.
- Several changed words of one row (two swapped, a stretch of zeros, flipped signs): for a fault fixed before uniformly
  random odd weights are drawn, hold all weights but one `a_j`. `d` has at most 31 factors of two, so at most 2^31 of
  the 2^63 odd `a_j` give the one value that cancels the rest: the fault escapes with probability at most 2^-32, for
  most faults near 2^-63.
- Several changed rows: the mixed sums would have to cancel, which for random 64-bit values happens once in about 2^63.

This is the multilinear hash of Carter and Wegman (1979) on two levels. It finds faults, not forgeries: the weights are
public.

Dimensions: `R` rows, `L` words of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from miles_spec.sync.dtypes import dtype_name

ROW_WORDS = 1 << 16
"""`L`. Part of the format: another value gives other digests. A row's 512 KiB of products stay in a core's cache."""

GPU_ROWS = 64
"""Rows multiplied at once on a GPU, 32 MiB of products; the digest does not depend on it."""


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer (Steele, Lea and Flood 2014, figure 16, as in Vigna's C code), a bijection of int64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _weights(count: int, stream: int, device: torch.device) -> Tensor:
    """`[count]` odd int64: splitmix64's sequence, an independent one for each `stream` below 2^20."""
    index = torch.arange(1, count + 1, dtype=torch.int64, device=device) + (stream << 40)
    return _mix(index * _signed(0x9E3779B97F4A7C15)) | 1


@cache
def _row_weights(device: torch.device) -> Tensor:
    return _weights(ROW_WORDS, 0, device)


def _words(tensor: Tensor) -> Tensor:
    """`[ceil(bytes / 4)]` int32: the tensor's bytes in row-major order, a view wherever one is possible."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    padding = -data.numel() % 4
    if padding:
        data = torch.cat([data, data.new_zeros(padding)])
    elif data.storage_offset() % 4:
        data = data.clone()  # a view as int32 has to start on a whole word
    return data.view(torch.int32)


def _row_sums(tensor: Tensor) -> Tensor:
    """`[rows]` int64: `s_r` of a tensor's rows, on its device, without host synchronisation."""
    words = _words(tensor)
    weights = _row_weights(words.device)
    whole = words.numel() // ROW_WORDS
    rows, rest = words[: whole * ROW_WORDS].view(whole, ROW_WORDS), words[whole * ROW_WORDS :]
    sums = torch.empty(whole + (rest.numel() > 0), dtype=torch.int64, device=words.device)
    at_once = GPU_ROWS if words.is_cuda else 1
    products = torch.empty(min(at_once, whole), ROW_WORDS, dtype=torch.int64, device=words.device)
    for start in range(0, whole, at_once):
        block = rows[start : start + at_once]
        out = products[: block.shape[0]]
        torch.mul(block, weights, out=out)
        torch.sum(out, 1, out=sums[start : start + at_once][: block.shape[0]])
    if rest.numel():
        torch.sum(rest * weights[: rest.numel()], 0, out=sums[whole])
    return sums


def _numbers(sums: list[Tensor]) -> list[int]:
    """The digests' numbers from the row sums of tensors on one device: one pass over all, and one transfer."""
    device, lengths = sums[0].device, torch.tensor([len(s) for s in sums])
    ends = lengths.cumsum(0)
    at = torch.arange(int(ends[-1])) - (ends - lengths).repeat_interleave(lengths)
    weights = _weights(int(lengths.max()), 1, device)
    terms = _mix(torch.cat(sums)) * weights[at.to(device)]
    owners = torch.arange(len(sums)).repeat_interleave(lengths).to(device)
    return terms.new_zeros(len(sums)).index_add_(0, owners, terms).tolist()


class Digester:
    """Collects tensors one by one and reads all digests at the end, in one transfer per device.

    A GPU gets few kernels per tensor: what follows the row sums is done for all tensors at once. Working memory is
    512 KiB on a CPU and 32 MiB on a GPU, and a copy of a tensor that is not contiguous.
    """

    def __init__(self) -> None:
        self._heads: dict[str, str] = {}
        self._sums: dict[torch.device, dict[str, Tensor]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes the digest of a dense tensor as it is now. Raises `ValueError` for a name that was added before."""
        if name in self._heads:
            raise ValueError(f"tensor {name!r} comes twice; give every tensor its own name")
        self._heads[name] = f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
        self._sums.setdefault(tensor.device, {})[name] = _row_sums(tensor)

    def read(self) -> dict[str, str]:
        """Name to digest, `dtype[shape]:16 hexadecimal digits`, in the order of `add`."""
        numbers: dict[str, int] = {}
        for sums in self._sums.values():
            numbers |= zip(sums, _numbers(list(sums.values())), strict=True)
        return {name: f"{head}:{numbers[name] & (1 << 64) - 1:016x}" for name, head in self._heads.items()}


def digests(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Name to digest of every tensor, with one transfer per device. Raises `ValueError` for a name that comes twice."""
    digester = Digester()
    for name, tensor in named:
        digester.add(name, tensor)
    return digester.read()


def digest(tensor: Tensor) -> str:
    """The digest of one dense tensor, `dtype[shape]:16 hexadecimal digits`."""
    return digests([("", tensor)])[""]
