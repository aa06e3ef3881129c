from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from conftest import tiny_model
from miles_spec.kernels import attention
from miles_spec.kernels.attention import ChainAttention, PackedAttention
from miles_spec.kernels.layout import PackedLayout
from oracles import attention as oracle
from oracles.numbers import relative_error

HEADS, KEY_HEADS, SIZE, SCALE = 4, 2, 8, 0.3


def _qkv(n: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, n, SIZE), (KEY_HEADS, n, SIZE), (KEY_HEADS, n, SIZE))
    return [torch.randn(1, *s, generator=g).to(device, dtype).requires_grad_() for s in shapes]


def _starts(layout: PackedLayout) -> list[int]:
    return (torch.arange(layout.tokens) - layout.positions).tolist()


def _dense(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Attention with a full boolean mask, in the dtype at hand; `[Hq, q, D]`."""
    key, value = (x[0].repeat_interleave(HEADS // KEY_HEADS, 0) for x in (key, value))
    scores = (query[0] @ key.mT * SCALE).masked_fill(~visible, float("-inf"))
    return torch.softmax(scores, -1) @ value


def _packed_mask(layout: PackedLayout) -> Tensor:
    row = torch.arange(layout.tokens)
    return (layout.segments == layout.segments[:, None]) & (row <= row[:, None])


@pytest.mark.parametrize("lengths", [[5], [3, 0, 1, 6], [1, 1], []])
def test_packed_attention_stays_in_its_segment(lengths: list[int]) -> None:
    layout = PackedLayout.make(lengths)
    qkv = _qkv(layout.tokens, 1)
    got = PackedAttention(layout)(0, *qkv, SCALE)
    double = [x.detach().double().requires_grad_() for x in qkv]
    want = _dense(*double, _packed_mask(layout))[None]
    assert got.shape == want.shape and relative_error(got, want) < 1e-6
    if layout.tokens:
        weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
        (got * weight).sum().backward()
        (want * weight).sum().backward()
        assert all(relative_error(a.grad, b.grad) < 1e-6 for a, b in zip(qkv, double, strict=True))


def _chain_rows(layout: PackedLayout, depth: int) -> list[Tensor]:
    """All rows, then shrinking subsets that leave one segment out at depth 3."""
    rows = [torch.arange(layout.tokens)]
    for d in range(1, depth):
        keep = layout.positions[rows[-1]] >= d
        if d == 2:
            keep &= layout.segments[rows[-1]] != 0
        rows.append(rows[-1][keep])
    return rows


@pytest.mark.parametrize("lengths", [[6], [4, 0, 2, 7, 1]])
def test_chain_attention_matches_pure_loops(lengths: list[int]) -> None:
    layout = PackedLayout.make(lengths)
    rows = [r for r in _chain_rows(layout, 4) if len(r)]
    depths = [_qkv(len(r), 10 + d) for d, r in enumerate(rows)]
    chain = ChainAttention(layout)
    got = [(chain if d == 0 else chain.at(rows[d]))(0, *qkv, SCALE) for d, qkv in enumerate(depths)]
    exact = [tuple(x[0].detach().double() for x in qkv) for qkv in depths]
    want = oracle.chain(exact, [r.tolist() for r in rows], _starts(layout), SCALE)
    assert all(relative_error(a[0], b) < 1e-6 for a, b in zip(got, want, strict=True))


def test_chain_attention_gradients_flow_through_every_depth() -> None:
    layout = PackedLayout.make([4, 0, 2, 7, 1])
    rows = _chain_rows(layout, 3)
    depths = [_qkv(len(r), 20 + d) for d, r in enumerate(rows)]
    exact = [[x.detach().double().requires_grad_() for x in qkv] for qkv in depths]
    chain = ChainAttention(layout)
    got = [(chain if d == 0 else chain.at(rows[d]))(0, *qkv, SCALE) for d, qkv in enumerate(depths)]
    want, visible = [], _packed_mask(layout)
    for d, (query, _, _) in enumerate(exact):
        own = [r[None] == rows[d][:, None] for r in rows[1 : d + 1]]
        mask = torch.cat([visible[rows[d]], *own], dim=1)
        key, value = (torch.cat([exact[j][i] for j in range(d + 1)], dim=2) for i in (1, 2))
        want.append(_dense(query, key, value, mask)[None])
    for outs in (got, want):
        total = torch.zeros((), dtype=outs[0].dtype)
        for d, out in enumerate(outs):
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(d))
            total = total + (out * weight).sum()
        total.backward()
    for d in range(3):
        for a, b in zip(depths[d], exact[d], strict=True):
            assert b.grad.abs().sum() > 0 and relative_error(a.grad, b.grad) < 1e-6


def test_a_chain_never_sees_another_row_or_a_later_token() -> None:
    """Changing any key that a query must not see leaves its output bit for bit."""
    layout = PackedLayout.make([5, 6])
    rows = [torch.arange(11), torch.tensor([1, 2, 3, 6, 8])]

    def run(spoil_base: list[int], spoil_own: list[int]) -> Tensor:
        first, second = ([x.detach().clone() for x in _qkv(len(r), 30 + d)] for d, r in enumerate(rows))
        for x in first[1:]:
            x[:, :, spoil_base] = 1e3
        for x in second[1:]:
            x[:, :, spoil_own] = 1e3
        chain = ChainAttention(layout)
        chain(0, *first, SCALE)
        return chain.at(rows[1])(0, *second, SCALE)

    clean = run([], [])
    # row 2 is the second query: later tokens, the other segment and the other rows' chains are spoiled
    assert torch.equal(run([3, 4, 5, 10], [0, 2, 3, 4])[:, :, 1], clean[:, :, 1])
    assert not torch.equal(run([0], [])[:, :, 1], clean[:, :, 1])
    assert not torch.equal(run([], [1])[:, :, 1], clean[:, :, 1])


def test_models_compute_as_with_their_own_attention(family: str) -> None:
    model = tiny_model(family)
    layout = PackedLayout.make([5, 9])
    tokens = torch.randint(0, 61, (1, 14), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        positions = layout.positions[None]
        got = model(tokens, position_ids=positions, attend=PackedAttention(layout), use_cache=False).logits
        model.set_attn_implementation("eager")
        want = torch.cat([model(part, use_cache=False).logits for part in tokens.split([5, 9], dim=1)], dim=1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_and_chain_attention_on_a_gpu(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    attention._note_slow_path.cache_clear()
    host = PackedLayout.make([40, 0, 3, 129, 1])
    layout = host.to("cuda")
    rows = _chain_rows(host, 2)
    depths = [_qkv(len(r), 40 + d, dtype, "cuda") for d, r in enumerate(rows)]
    exact = [[x.detach().cpu().double().requires_grad_() for x in qkv] for qkv in depths]
    chain = ChainAttention(layout)
    with caplog.at_level(logging.WARNING):
        got = [chain(0, *depths[0], SCALE), chain.at(rows[1].cuda())(0, *depths[1], SCALE)]
        PackedAttention(layout)(0, *depths[0], SCALE)
    # the slow path says so, once
    assert len(caplog.records) == (dtype == torch.float32)
    own = torch.eye(len(rows[1]), dtype=torch.bool)
    key, value = (torch.cat([exact[0][i], exact[1][i]], dim=2) for i in (1, 2))
    mask = _packed_mask(host)
    want = [
        _dense(*exact[0], mask)[None],
        _dense(exact[1][0], key, value, torch.cat([mask[rows[1]], own], dim=1))[None],
    ]
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    sum(x.float().sum() for x in got).backward()
    sum(x.sum() for x in want).backward()
    assert all(relative_error(a.cpu(), b) < limit for a, b in zip(got, want, strict=True))
    for a, b in zip([*depths[0], *depths[1]], [*exact[0], *exact[1]], strict=True):
        assert relative_error(a.grad.cpu(), b.grad) < 2 * limit
