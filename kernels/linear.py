"""What the kernels with an LM head in them share: its product in bounded memory, single logits, its shards over a TP
group.

Invariant: logits are float32 wherever they are read, and no more of them exist than the caller asked memory for.

Dimensions: `n` rows of a chunk, `H` hidden, `V` vocabulary (this rank's share of it), `K` numbers per row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spec.kernels.backend import jit, tl

HALF = (torch.bfloat16, torch.float16)


class Product:
    """Memory for the logits of one chunk, taken once: to allocate it anew for every chunk costs a CPU more than the
    sums over it.

    The result of a call is overwritten by the next call.
    """

    def __init__(self, like: Tensor, columns: int, rows: int) -> None:
        """Room for `rows * columns` logits, in any shape that has no more, from factors of the dtype and device of
        `like`: float32, bfloat16 or float16."""
        if like.dtype != torch.float32 and like.dtype not in HALF:
            raise ValueError(f"hidden states and head must be float32, bfloat16 or float16, not {like.dtype}")
        self._wide = like.new_empty(rows * columns, dtype=torch.float32)
        # a GPU needs it for `narrow` alone
        self._narrow = like.new_empty(0 if like.is_cuda else rows * columns) if like.dtype in HALF else self._wide

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x @ weight.T` `[n, V]` float32, contiguous, from `x` `[n, H]` and `weight` `[V, H]`.

        On a GPU half precision is summed and returned in float32. On a CPU it comes out of the product rounded to half
        precision: the instructions for that are several times faster. float32 on a GPU is as exact as
        `torch.backends.cuda.matmul` asks for: TF32 is used only where it is switched on there.
        """
        n, columns = x.shape[0], weight.shape[0]
        out = self._wide[: n * columns].view(n, columns)
        if x.dtype == torch.float32:
            return torch.mm(x, weight.T, out=out)
        if x.is_cuda:
            return torch.mm(x, weight.T, out_dtype=torch.float32, out=out)
        return out.copy_(torch.mm(x, weight.T, out=self.narrow(out)))

    def narrow(self, logits: Tensor) -> Tensor:
        """Memory of the shape of `logits`, the last result, in the factors' dtype: for their gradient, which the next
        products take. In float32 it is that of `logits` itself. Overwritten by the next call."""
        size = logits.numel()
        if self._narrow.numel() < size:
            self._narrow = self._narrow.new_empty(self._wide.numel())
        return self._narrow[:size].view(logits.shape)


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """`total += a @ b`, or `total = a @ b` for the `first` of a sum; `a` `[m, k]`, `b` `[k, n]`, `total` `[m, n]`
    float32 or of the factors' dtype (which a sum of several products should not be). Half precision as in `Product`."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif a.is_cuda:
        if first:
            torch.mm(a, b, out_dtype=torch.float32, out=total)
        else:
            total += torch.mm(a, b, out_dtype=torch.float32)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


@jit(varying=("labels_ptr", "n"))
def _label_kernel(x_ptr, head_ptr, labels_ptr, out_ptr, n, H, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + tl.minimum(row, n - 1))
    length = tl.where((row < n) & (label >= 0), H, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < length
        x = tl.load(x_ptr + row * H + at, mask=mask, other=0.0).to(tl.float32)
        total += x * tl.load(head_ptr + label * H + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(total, 0))


def label_logits(x: Tensor, head: Tensor, labels: Tensor, *, use_triton: bool) -> Tensor:
    """`[w]` float32: `x[i] @ head[labels[i]]`, and 0 where there is no label or no row; `x` `[w, H]` and `head`
    contiguous, `labels` `[n]` int64, `n` at most `w`, below 0 for none."""
    if use_triton:
        out = x.new_empty(len(x), dtype=torch.float32)
        _label_kernel[(len(x),)](x, head, labels, out, len(labels), x.shape[1], BLOCK=1024, num_warps=4)
    else:
        out = x.new_zeros(len(x), dtype=torch.float32)
        found = (x[: len(labels)].float() * head[labels.clamp(min=0)].float()).sum(-1)
        out[: len(labels)] = torch.where(labels >= 0, found, 0)
    return out


def gather_states(state: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`[tp, n, K]` from each rank's `state` `[n, K]`, in the order of ranks; one collective, none without a group."""
    if group is None or group.size() == 1:
        return state[None]
    out = state.new_empty(group.size() * state.shape[0], state.shape[1])
    dist.all_gather_into_tensor(out, state.contiguous(), group=group)
    return out.view(group.size(), *state.shape)


def vocab_range(local: int, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """First token id of this rank's shard of `local` rows, and one past its last. Shards are equal and lie in the order
    of ranks, as in Megatron; a vocabulary that does not divide evenly has to be padded before."""
    first = 0 if group is None else group.rank() * local
    return first, first + local


def whole_vocab(weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`[V, H]` detached, a weight over the vocabulary of which each rank of `group` has its share (`vocab_range`)."""
    return gather_states(weight.detach(), group).flatten(0, 1)


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on for their device, else as they are."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


def no_autocast(like: Tensor) -> torch.autocast:
    """Autocast off for the device of `like`: a hand-written forward and backward choose their own dtypes."""
    return torch.autocast(like.device.type, enabled=False)


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `0..rows`."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
