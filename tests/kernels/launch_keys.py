"""What each Triton kernel would be compiled for, over packs of many sizes; printed as JSON.

Nothing is compiled and nothing runs, so no GPU is needed: a launch is only asked for the key that its compiled version
would have. Run as a script, in a process without `TRITON_INTERPRET`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from miles_spec.kernels import backend
from miles_spec.kernels.chain_attention import ChainAttention
from miles_spec.kernels.draft_loss import Mix, draft_loss
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.logprob import logprob
from miles_spec.kernels.shift import _mark_triton, draft_targets, shift

COMPILER = make_backend(GPUTarget("cuda", 90, 32))
DEPTH, HIDDEN, VOCAB = 3, 64, 640
LENGTHS = (1, 2, 3, 10, 17, 20, 21, 33, 42, 47, 48, 100)

found: defaultdict[str, set[str]] = defaultdict(set)


@cache
def _binder(kernel: Any) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, COMPILER)


def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """In place of `JITFunction.run`."""
    bound, specialization, options = _binder(kernel)(*arguments, **options)
    key = {name: " ".join(map(str, kind)) for name, kind in zip(bound, specialization, strict=True)}
    found[f"{kernel.module.rsplit('.')[-1]}.{kernel.__name__}"].add(json.dumps({**key, "options": str(options)}))


def attention(layout: PackedLayout) -> None:
    """A pass and its backward at every depth, from the first third of the first piece on."""
    chain = ChainAttention(layout, [layout.tokens // 4, 0], backend="triton")
    query, key = (torch.zeros(1, heads, layout.tokens, 16, requires_grad=True) for heads in (4, 2))
    out = chain(0, query, key, key, 1.0).sum()
    deeper = [x[:, :, chain.rows] for x in (query, key, key)]
    for _ in range(DEPTH - 1):
        out = out + chain.deeper(0, *deeper, 1.0).sum()
    out.backward()


def losses(length: int, head: Tensor, chunk_rows: int) -> None:
    """The draft's, as they train and as they only estimate, and the policy's log-probabilities; blocks of `DEPTH` rows
    but for the last ones, which are cut short, so that chunks start at odd rows too."""
    chain = torch.cat([torch.arange(min(DEPTH, length - i)) for i in range(length)])
    n = len(chain)
    states, teacher, labels = (torch.zeros(n, HIDDEN, requires_grad=True), torch.zeros(length, HIDDEN), chain)
    more: dict[str, Any] = {"teacher_rows": torch.zeros_like(chain), "chain": chain, "depth": DEPTH}
    how: dict[str, Any] = {"rule": "rejection", "chunk_rows": chunk_rows, "backend": "triton"}
    for mix in (Mix(kl=1), Mix(kl=0.5, tv=0.5)):
        for top_p in (1.0, 0.9):
            draft_loss(states, head, teacher, labels, mix=mix, top_p=top_p, **more, **how).total.backward()
    with torch.no_grad():
        draft_loss(states, head, teacher, labels, mix=Mix(kl=1), **more, **how)
    logprob(states, head, labels, chunk_rows=chunk_rows, backend="triton").logprob.sum().backward()


def pack(length: int) -> None:
    """What is launched for a pack of two responses."""
    layout = PackedLayout.make([length, length // 2 + 1])
    tokens, sampled = torch.zeros(layout.tokens, dtype=torch.int64), torch.ones(layout.tokens, dtype=torch.bool)
    draft_targets(tokens, sampled, layout, DEPTH, backend="triton")
    _mark_triton(tokens, sampled, torch.zeros(length, dtype=torch.int64))
    states = torch.zeros(layout.tokens, HIDDEN, requires_grad=True)
    shift(states, layout, 2, backend="triton").sum().backward()
    attention(layout)
    for chunk_rows in (1024, 50):
        for trains in (False, True):
            losses(length, torch.zeros(VOCAB, HIDDEN, requires_grad=trains), chunk_rows)


JITFunction.run = note  # type: ignore[method-assign]
backend.interpreted = lambda: True  # so that tensors on a CPU do
for size in LENGTHS:
    pack(size)
print(json.dumps({name: [json.loads(key) for key in sorted(keys)] for name, keys in found.items()}))
