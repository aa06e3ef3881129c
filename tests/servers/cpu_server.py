"""Runs `miles_spec.rollout.launch` on a machine without a GPU, for tests of tiny models.

Invariant: only what needs a GPU is replaced; scheduler, HTTP server, weights and verification are SGLang's own. It has
to be the main script: SGLang spawns its processes, and each of them runs this file again before anything else, so that
every one of them is patched.

Only float32: Triton's interpreter rounds bfloat16 wrongly. Only topk 1: the attention here knows no trees. The
arguments it needs are `ARGUMENTS` in conftest.py.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import os
import sys
import types

import torch
import torch.nn.functional as F
from torch import Tensor

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported


def _keep_top_p(probs: Tensor, top_p: Tensor) -> Tensor:
    """`[n, V]` probabilities without the tail beyond `top_p` `[n]`; the token that crosses it stays."""
    ordered, order = probs.sort(dim=-1, descending=True)
    tail = ordered.cumsum(-1) - ordered >= top_p.view(-1, 1)
    kept = probs.masked_fill(torch.zeros_like(tail).scatter(-1, order, tail), 0)
    return kept / kept.sum(-1, keepdim=True)


def _keep_top_k(probs: Tensor, top_k: Tensor) -> Tensor:
    """`[n, V]` probabilities of the `top_k` `[n]` likeliest tokens; ties with the last one stay."""
    last = top_k.view(-1, 1).long().clamp(1, probs.shape[-1]) - 1
    kept = probs.masked_fill(probs < probs.sort(dim=-1, descending=True)[0].gather(-1, last), 0)
    return kept / kept.sum(-1, keepdim=True)


def _verify_by_target(
    *,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    **_: object,
) -> None:
    """Accepts a drafted token with the target's own probability, row by row along one chain.

    What follows the accepted ones is drawn from the target without the token that was refused. SGLang's kernel of this
    name is compiled for GPUs only. `candidates` `[B, k + 1]`, the first a token that stands already.
    """
    for row in range(len(candidates)):
        slots, probs = retrive_index[row].tolist(), target_probs[row].double()
        accept_index[row, 0] = slots[0]
        accepted = 0
        rest = probs[0]
        while accepted + 1 < len(slots):
            token = int(candidates[row, accepted + 1])
            if uniform_samples[row, accepted] > probs[accepted, token]:
                rest = probs[accepted].clone()
                rest[token] = 0
                break
            predicts[slots[accepted]] = token
            accepted += 1
            accept_index[row, accepted] = slots[accepted]
            rest = probs[accepted]
        edge = rest.cumsum(-1)
        draw = uniform_samples_for_final_sampling[row].double() * edge[-1]
        predicts[slots[accepted]] = torch.searchsorted(edge, draw, right=True).clamp(max=len(edge) - 1).int()
        accept_token_num[row] = accepted


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """`[q, heads, d]`: the last `q` of the `n` tokens of one sequence attend to it, causally."""
    q, k, v = (x.transpose(0, 1) for x in (query, keys, values))
    behind = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=behind, scale=scale, enable_gqa=True)
    return out.transpose(0, 1)


def _extend_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cached_k: Tensor,
    cached_v: Tensor,
    q_ends: Tensor,
    cached_ends: Tensor,
    slots: Tensor,
    mask: Tensor | None,
    causal: bool,
    mask_ends: Tensor | None,
    longest: int,
    k_scale: float,
    v_scale: float,
    scale: float,
    **_: object,
) -> None:
    """New tokens after a cached prefix, of several sequences. A mask is that of a tree with one branch: causal."""
    assert causal
    ends, prefixes = q_ends.tolist(), cached_ends.tolist()
    for row, (start, stop) in enumerate(itertools.pairwise(ends)):
        own, old = slice(start, stop), slots[prefixes[row] : prefixes[row + 1]].long()
        keys, values = k[own], v[own]
        if len(old):  # what is cached of latent attention has one head, as what is new then has
            keys, values = torch.cat([cached_k[old], keys]), torch.cat([cached_v[old], values])
        if start < stop:
            out[own] = _attend(q[own], keys, values, scale)


def _decode_attention(
    q: Tensor,
    cached_k: Tensor,
    cached_v: Tensor,
    out: Tensor,
    cached_ends: Tensor,
    slots: Tensor,
    logits: Tensor,
    lse: Tensor,
    splits: Tensor,
    max_splits: int,
    scale: float,
    *_: object,
    **__: object,
) -> None:
    """One new token of each sequence; its key is cached already."""
    ends = cached_ends.tolist()
    for row in range(len(q)):
        own = slots[ends[row] : ends[row + 1]].long()
        out[row : row + 1] = _attend(q[row : row + 1], cached_k[own], cached_v[own], scale)


def _absent(*args: object, **kwargs: object) -> None:
    raise NotImplementedError("a GPU kernel was called")


def _module(name: str, **members: object) -> None:
    """Makes `import name` find a module of just these members."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package="." not in name)
    module.__path__ = []
    vars(module).update(members)
    sys.modules[name] = module


SAMPLING = {
    "top_p_renorm_prob": _keep_top_p,
    "top_k_renorm_prob": _keep_top_k,
    "tree_speculative_sampling_target_only": _verify_by_target,
}


def _stand_in() -> None:
    """Puts what is missing on a CPU in place."""
    _module("sgl_kernel", **SAMPLING)
    _module("vllm")
    # imported on platforms that SGLang does not know; it then runs its own PyTorch code
    _module("vllm._custom_ops", rotary_embedding=_absent, fused_add_rms_norm=_absent, rms_norm=_absent)
    # these describe torchvision's compiled operators, which may be of another build of torch and absent
    _module("torchvision._meta_registrations")
    _module("torchvision._autograd_registrations")
    # the weights checker calls these two
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]


def _patch() -> None:
    """Changes SGLang's choices where it has no GPU to go by."""
    from sglang.kernels.ops.attention import decode_attention, extend_attention
    from sglang.kernels.ops.speculative import cache_locs, spec_tree
    from sglang.srt.model_loader import utils as loading
    from sglang.srt.speculative import eagle_utils

    # interpreted, these two would take nine tenths of the time
    extend_attention.extend_attention_fwd = _extend_attention
    decode_attention.decode_attention_fwd = _decode_attention
    # the branch of XPU is Triton throughout, which can be interpreted; but it would verify greedily at any temperature
    cache_locs._is_xpu = spec_tree._is_xpu = eagle_utils._is_xpu = True
    vars(eagle_utils).update(SAMPLING)  # from 0.5.23 it takes them when it is imported, and on a CPU finds none
    eagle_utils._verify_uses_greedy = lambda *, is_all_greedy, **_: is_all_greedy
    # DeepSeek's models load tensors that lie on a CPU in threads, where nobody watches; those on a GPU they do not
    loading.should_async_load = lambda _: False


_stand_in()
if sys.argv[1:] != ["--flags"]:  # which needs no more
    _patch()

if __name__ == "__main__":
    from miles_spec.rollout.launch import main

    main()
