"""Digests of tensors: what a trainer sent and an engine serves are compared by these.

Invariant: a digest depends on dtype, shape and the bytes in row-major order alone, not on device or strides.

The bytes are read as words `w` of 32 bits with a sign, the last one padded with zeros, and the words as chunks `c` of
`ROWS` rows `r` and `COLUMNS` columns `j`, one after the other:

    column sum   s_cj = sum_r w_crj * a_r              mod 2^64
    digest       h    = sum_cj mix(s_cj) * b_cj        mod 2^64

with fixed pseudo-random odd weights `a`, `b` and splitmix64's `mix`, a bijection of 64-bit integers that keeps 0, so
that words beyond the end count nothing.

- One changed word is always noticed: its difference `d` has `0 < |d| < 2^32`, and an odd weight is invertible mod 2^64,
  so `d * a_r != 0` and that one column sum differs; `mix` is a bijection and `b_cj` odd, so `h` differs. A flipped bit
  or byte is such a change.
- Two words of one column swapped, or both with the sign flipped, are always noticed too: the sum changes by
  `d * (a_r - a_q)` or by `2^31 * (a_r + a_q)` or `2^31 * (a_r - a_q)`. `d` has at most 31 factors of two, and no sum or
  difference of two of these weights has 33.
- Several changed words of one column (a stretch of zeros, say): for a fault fixed before uniformly random odd weights
  are drawn, hold all weights but one `a_r`. `d` has at most 31 factors of two, so at most 2^31 of the 2^63 odd `a_r`
  give the one value that cancels the rest: the fault escapes with probability at most 2^-32, for most faults near
  2^-63.
- Several changed columns: the mixed sums would have to cancel, which for random 64-bit values happens once in about
  2^63. Where columns changed places, once in about 2^58: `b_x - b_y` is even.

This is the multilinear hash of Carter and Wegman (1979) on two levels. It finds faults, not forgeries: the weights are
public.

Dimensions: `R` rows, `C` columns, `N` chunks of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from miles_spec.sync.dtypes import dtype_name

if TYPE_CHECKING:
    from miles_spec.kernels.backend import Backend

ROWS = 256
"""`R`. Part of the format, as `COLUMNS`: another value gives other digests. There is one `mix` to so many words."""

COLUMNS = 256
"""`C`. A chunk's 512 KiB of products stay in a core's cache, and its 256 KiB are a program's work on a GPU."""

GPU_CHUNKS = 64
"""Chunks multiplied at once on a GPU without Triton, 32 MiB of products; the digest does not depend on it."""

COPIES_BYTES, SUMS_BYTES = 64 << 20, 1 << 20
"""What may wait for the next step, and one tensor's more: copies of tensors for a launch, or column sums."""


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix_(x: Tensor) -> Tensor:
    """splitmix64's finalizer (Steele, Lea and Flood 2014, figure 16, as in Vigna's C code), a bijection of int64, in
    place."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << 64 - shift) - 1)).mul_(_signed(factor))
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


@cache
def _weights(count: int, stream: int, device: torch.device) -> Tensor:
    """`[count]` odd int64: splitmix64's sequence, an independent one for each `stream` below 2^20."""
    index = torch.arange(1, count + 1, dtype=torch.int64) + (stream << 40)
    return (_mix_(index * _signed(0x9E3779B97F4A7C15)) | 1).to(device)


def row_weights(device: torch.device) -> Tensor:
    """`a`, `[R]` int64."""
    return _weights(ROWS, 0, device)


def _column_weights(count: int, device: torch.device) -> Tensor:
    """The first of `b`, `[count]` int64. A table to the next power of two is kept, 1/64 of a tensor's bytes at most."""
    return _weights(1 << (count - 1).bit_length(), 1, device)[:count]


def _words(tensor: Tensor) -> Tensor:
    """`[ceil(bytes / 4)]` int32: the tensor's bytes in row-major order, a view wherever one is possible."""
    data = tensor.detach().contiguous()
    # one element or none is contiguous at any stride, which `view` does not take
    data = data.as_strided((data.numel(),), (1,)).view(torch.uint8)
    padding = -data.numel() % 4
    if padding:
        data = torch.cat([data, data.new_zeros(padding)])
    elif data.storage_offset() % 4 or data.data_ptr() % 4:
        data = data.clone()  # words have to start at their own multiples
    return data.view(torch.int32)


def _column_sums(words: Tensor) -> Tensor:
    """`[N C]` int64: `s_cj`, on the words' device, without host synchronisation."""
    weights = row_weights(words.device)[:, None]
    size = ROWS * COLUMNS
    whole, rest = divmod(words.numel(), size)
    sums = torch.empty(whole + (rest > 0), COLUMNS, dtype=torch.int64, device=words.device)
    if whole:
        at_once = min(GPU_CHUNKS, whole) if words.is_cuda else 1
        chunks = words[: whole * size].view(whole, ROWS, COLUMNS)
        products = torch.empty(at_once, ROWS, COLUMNS, dtype=torch.int64, device=words.device)
        for start in range(0, whole, at_once):
            block = chunks[start : start + at_once]
            out = products[: block.shape[0]]
            torch.mul(block, weights, out=out)
            torch.sum(out, 1, out=sums[start : start + block.shape[0]])
    if rest:
        last = words[whole * size :]
        if more := -rest % COLUMNS:
            last = torch.constant_pad_nd(last, (0, more))
        rows = last.view(-1, COLUMNS)
        torch.sum(rows * weights[: rows.shape[0]], 0, out=sums[whole])
    return sums.view(-1)


def _numbers(sums: list[Tensor]) -> Tensor:
    """`[T]` int64: `h` of the tensors whose column sums these are, on one device."""
    lengths = list(map(len, sums))
    weights = _column_weights(max(lengths), sums[0].device)
    terms = _mix_(torch.cat(sums)).mul_(torch.cat([weights[:length] for length in lengths]))
    return torch.stack([part.sum() for part in terms.split(lengths)])


@dataclass(slots=True, kw_only=True)
class _Lane:
    """The tensors of one device, in order."""

    kernel: bool
    """Whether Triton's computes them, many in a launch."""
    names: list[str] = field(default_factory=list)
    numbers: list[Tensor] = field(default_factory=list)
    """One int64 to a name, in tensors of one dimension, but for what waits."""
    places: list[tuple[Tensor, int, int]] = field(default_factory=list)
    """Waiting for the kernel: what has to live until then, its address and its words."""
    sums: list[Tensor] = field(default_factory=list)
    """Waiting without it: column sums."""
    waiting_bytes: int = 0
    """Copies among `places`, or `sums`."""


def _takes_kernel(backend: Backend, like: Tensor) -> bool:
    """`use_triton`, which imports Triton only where it may be needed."""
    if backend == "reference" or (backend == "auto" and not like.is_cuda):
        return False
    from miles_spec.kernels.backend import use_triton

    return use_triton(backend, like)


class Digester:
    """Collects tensors one by one and reads all digests at the end, in one transfer per device.

    On a CPU a tensor is read when it is added. On a GPU it is read by the next `flush`, one launch for all that were
    added since the last, and has to stay as it is until then. Working memory is a few MB on a CPU; on a GPU, copies of
    tensors that are not contiguous or not of whole, aligned words, at most `COPIES_BYTES` and one more. A GPU without
    Triton works as a CPU does, in 32 MiB.

    `backend` is as in `kernels/backend.py`, which raises `ValueError` for `triton` where it cannot run.
    """

    def __init__(self, backend: Backend = "auto") -> None:
        self._backend: Backend = backend
        self._heads: dict[str, str] = {}
        self._lanes: dict[torch.device, _Lane] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes the digest of a dense tensor. Raises `ValueError` for a name that was added before."""
        if name in self._heads:
            raise ValueError(f"tensor {name!r} comes twice; give every tensor its own name")
        lane = self._lanes.get(tensor.device)
        if lane is None:
            lane = self._lanes[tensor.device] = _Lane(kernel=_takes_kernel(self._backend, tensor))
        self._heads[name] = f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
        lane.names.append(name)
        if lane.kernel:
            address, size = tensor.data_ptr(), tensor.nbytes
            if address % 4 or size % 4 or not tensor.is_contiguous():
                tensor = _words(tensor)
                address, size = tensor.data_ptr(), tensor.nbytes
                lane.waiting_bytes += size
            lane.places.append((tensor, address, size // 4))
        else:
            lane.sums.append(_column_sums(_words(tensor)))
            lane.waiting_bytes += lane.sums[-1].nbytes
        if lane.waiting_bytes > (COPIES_BYTES if lane.kernel else SUMS_BYTES):
            self.flush()

    def flush(self) -> None:
        """Queues the reading of all that was added, on the current stream of its device; whatever is queued there later
        may overwrite it. Waits for nothing."""
        for device, lane in self._lanes.items():
            if lane.places:
                from miles_spec.sync.digest_kernel import launch

                lane.numbers.append(launch([(address, words) for _, address, words in lane.places], device))
            if lane.sums:
                lane.numbers.append(_numbers(lane.sums))
            lane.places.clear()
            lane.sums.clear()
            lane.waiting_bytes = 0

    def read(self) -> dict[str, str]:
        """Name to digest, `dtype[shape]:16 hexadecimal digits`, in the order of `add`."""
        self.flush()
        numbers: dict[str, int] = {}
        for lane in self._lanes.values():
            numbers |= zip(lane.names, torch.cat(lane.numbers).tolist(), strict=True)
        return {name: f"{head}:{numbers[name] & (1 << 64) - 1:016x}" for name, head in self._heads.items()}


def digests(named: Iterable[tuple[str, Tensor]], backend: Backend = "auto") -> dict[str, str]:
    """Name to digest of every tensor, with one transfer per device. Raises `ValueError` for a name that comes twice."""
    digester = Digester(backend)
    for name, tensor in named:
        digester.add(name, tensor)
    return digester.read()


def digest(tensor: Tensor, backend: Backend = "auto") -> str:
    """The digest of one dense tensor, `dtype[shape]:16 hexadecimal digits`."""
    return digests([("", tensor)], backend)[""]
