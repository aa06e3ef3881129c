from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sharded_attention
from conftest import tiny_model
from distributed import Ranks
from miles_spec.kernels import attention
from miles_spec.kernels.attention import PackedAttention
from miles_spec.kernels.layout import PackedLayout, Sharding
from oracles.attention import dense
from oracles.numbers import relative_error
from sharded_attention import SHARDINGS

HEADS, KEY_HEADS, SIZE, SCALE = 4, 2, 8, 0.3


def _qkv(n: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, heads, SIZE, generator=g) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [x.transpose(0, 1)[None].to(device, dtype).requires_grad_() for x in made]


def _narrowed(qkv: list[Tensor], width: int) -> list[Tensor]:
    return [*qkv[:2], qkv[2].detach()[..., :width].requires_grad_()]


def _visible(layout: PackedLayout) -> Tensor:
    row = torch.arange(layout.tokens)
    return (layout.segments == layout.segments[:, None]) & (row <= row[:, None])


@pytest.mark.parametrize("width", [SIZE, SIZE - 3])
@pytest.mark.parametrize("lengths", [[5], [3, 0, 1, 6], [1, 1], []])
def test_packed_attention_stays_in_its_segment(lengths: list[int], width: int) -> None:
    """Also with values narrower than queries and keys, as latent attention has them."""
    layout = PackedLayout.make(lengths)
    qkv = _narrowed(_qkv(layout.tokens, 1), width)
    got = PackedAttention(layout)(0, *qkv, SCALE)
    double = [x.detach().double().requires_grad_() for x in qkv]
    want = dense(*double, _visible(layout), SCALE)
    assert got.shape == want.shape and relative_error(got, want) < 1e-6
    if layout.tokens:
        weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
        (got * weight).sum().backward()
        (want * weight).sum().backward()
        # where a segment is one token its queries and keys have no gradient, but for what rounding leaves
        least = float(double[2].grad.norm())
        for a, b in zip(qkv, double, strict=True):
            assert float((a.grad - b.grad).norm()) < 1e-6 * max(float(b.grad.norm()), least)


def test_the_values_say_which_precision_comes_out() -> None:
    layout = PackedLayout.make([4, 3])
    query, key, value = _qkv(7, 5)
    query = 20 * query  # rounding a score shows
    half = value.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = PackedAttention(layout)(0, query, key, half, SCALE)
    want = dense(query, key, half.float(), _visible(layout), SCALE)
    # on a CPU computed in float32: one rounding, that of the result
    assert got.dtype == torch.bfloat16 and relative_error(got, want.bfloat16()) < 1e-4


def _check_sharded(ranks: Ranks, size: int, lengths: list[int], sharding: Sharding) -> None:
    case = sharded_attention.Case(lengths=lengths, begin=[0] * len(lengths), sharding=sharding, depths=1)
    want, _ = sharded_attention.run(PackedLayout.make(lengths), case)
    for got, leaked in ranks.run(sharded_attention.run_rank, size, case):
        assert leaked == 0
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_context_parallel_equals_one_rank(ranks: Ranks, size: int, sharding: Sharding) -> None:
    _check_sharded(ranks, size, [37, 0, 5, 1, 16], sharding)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 19), min_size=1, max_size=5).filter(any),
    sharding=st.sampled_from(SHARDINGS),
    size=st.sampled_from([2, 4]),
)
def test_any_lengths(ranks: Ranks, lengths: list[int], sharding: Sharding, size: int) -> None:
    _check_sharded(ranks, size, lengths, sharding)


def _shape_when_empty(group: dist.ProcessGroup) -> tuple[int, ...]:
    return PackedAttention(PackedLayout.make([0, 0], cp_group=group))(0, *_qkv(0, 1), SCALE).shape


def test_an_empty_pack_on_several_ranks(ranks: Ranks) -> None:
    assert ranks.run(_shape_when_empty, 2) == [(1, HEADS, 0, SIZE)] * 2


def test_several_ranks_need_a_group() -> None:
    with pytest.raises(ValueError, match="cp_group"):
        PackedAttention(PackedLayout.make([8], cp_rank=0, cp_size=2))


def _logits(layout: PackedLayout, family: str) -> Tensor:
    tokens = torch.randint(0, 61, (sum(layout.lengths),), generator=torch.Generator().manual_seed(3))
    inputs = {"position_ids": layout.positions[None], "attend": PackedAttention(layout)}
    with torch.no_grad():
        return layout.unshard(tiny_model(family)(layout.shard(tokens)[None], **inputs, use_cache=False).logits[0])


def _logits_sharded(group: dist.ProcessGroup, lengths: list[int], family: str) -> Tensor:
    return _logits(PackedLayout.make(lengths, cp_group=group), family)


def test_models_compute_as_with_their_own_attention(family: str) -> None:
    model = tiny_model(family)
    got = _logits(PackedLayout.make([5, 9]), family)
    tokens = torch.randint(0, 61, (1, 14), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.set_attn_implementation("eager")
        want = torch.cat([model(part, use_cache=False).logits for part in tokens.split([5, 9], dim=1)], dim=1)
    torch.testing.assert_close(got, want[0], rtol=1e-4, atol=1e-5)


def test_a_model_over_two_ranks_computes_the_same(ranks: Ranks) -> None:
    want = _logits(PackedLayout.make([5, 9]), "qwen3")
    for got in ranks.run(_logits_sharded, 2, [5, 9], "qwen3"):
        assert relative_error(got, want) < 1e-6


def test_a_model_must_be_told_what_to_attend_to() -> None:
    with pytest.raises(ValueError, match="attend"):
        tiny_model("llama")(torch.zeros(1, 3, dtype=torch.int64))


def test_dropout_is_refused() -> None:
    model = tiny_model("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        model(torch.zeros(1, 3, dtype=torch.int64), attend=PackedAttention(PackedLayout.make([3])), use_cache=False)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [SIZE, SIZE - 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_attention_on_a_gpu(dtype: torch.dtype, width: int, caplog: pytest.LogCaptureFixture) -> None:
    attention._note_slow_path.cache_clear()
    host = PackedLayout.make([40, 0, 3, 129, 1])
    qkv = _narrowed(_qkv(host.tokens, 40, dtype, "cuda"), width)
    exact = [x.detach().cpu().double().requires_grad_() for x in qkv]
    layout = host.to("cuda")
    with caplog.at_level(logging.WARNING):
        got = PackedAttention(layout)(0, *qkv, SCALE)
        PackedAttention(layout)(0, *qkv, SCALE)
    # the slow path says so, once
    assert len(caplog.records) == (dtype == torch.float32)
    want = dense(*exact, _visible(host), SCALE)
    got.float().sum().backward()
    want.sum().backward()
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(got.cpu(), want) < limit
    for a, b in zip(qkv, exact, strict=True):
        assert relative_error(a.grad.cpu(), b.grad) < 2 * limit
