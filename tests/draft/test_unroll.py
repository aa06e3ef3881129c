from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE
from miles_spec.draft.unroll import unroll
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.shift import draft_targets
from oracles.serving import draft_states


def _pack(lengths: list[int], prompt: int = 2) -> tuple[PackedLayout, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    layout = PackedLayout.make(lengths)
    tokens = torch.randint(0, 61, (layout.tokens,), generator=g)
    return layout, tokens, layout.positions >= prompt, torch.randn(layout.tokens, 32, generator=g)


def test_every_depth_computes_what_serving_computes(family: str) -> None:
    model = tiny_model(family).double()
    head = DraftHead.attach(model, EAGLE, generator=torch.Generator().manual_seed(0))
    embed = model.get_input_embeddings().weight.detach()
    layout, tokens, loss_mask, hidden = _pack([7, 0, 3, 9, 1])
    hidden = hidden.double()
    targets = draft_targets(tokens, loss_mask, layout, 4)
    compared = 0
    with torch.no_grad():
        got = unroll(head, embed, hidden, targets, layout)
        for d, (rows, states) in enumerate(got):
            assert rows.tolist() == targets.mask[d].nonzero().flatten().tolist()
            for row, state in zip(rows.tolist(), states, strict=True):
                segment = int(layout.segments[row])
                part = slice(layout.offsets[segment], layout.offsets[segment + 1])
                want = draft_states(head, embed, hidden[part], tokens[part], row - part.start, d + 1)[d]
                # rotary tables are float32
                torch.testing.assert_close(state, want, rtol=1e-5, atol=1e-5)
                compared += 1
    assert compared == sum(int(m.sum()) for m in targets.mask) > 20


def test_packed_equals_alone() -> None:
    model = tiny_model().double()
    head = DraftHead.attach(model, EAGLE, generator=torch.Generator().manual_seed(0))
    embed = model.get_input_embeddings().weight.detach()
    layout, tokens, loss_mask, hidden = _pack([6, 8])
    hidden = hidden.double()
    both = unroll(head, embed, hidden, draft_targets(tokens, loss_mask, layout, 3), layout)
    for start, end in ((0, 6), (6, 14)):
        alone = PackedLayout.make([end - start])
        part = draft_targets(tokens[start:end], loss_mask[start:end], alone, 3)
        for (rows, states), (own, want) in zip(both, unroll(head, embed, hidden[start:end], part, alone), strict=True):
            inside = (rows >= start) & (rows < end)
            assert (rows[inside] - start).tolist() == own.tolist()
            torch.testing.assert_close(states[inside], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[], [0], [1, 2], [3, 1]])
def test_packs_too_short_for_the_depth(lengths: list[int]) -> None:
    model = tiny_model()
    head = DraftHead.attach(model, EAGLE)
    layout, tokens, loss_mask, hidden = _pack(lengths, prompt=1)
    targets = draft_targets(tokens, loss_mask, layout, 3)
    got = unroll(head, model.get_input_embeddings().weight.detach(), hidden, targets, layout)
    assert [(len(r), s.shape) for r, s in got] == [(n, (n, 32)) for n in targets.mask.sum(1).tolist()]


def test_attached_states_are_refused() -> None:
    model = tiny_model()
    head = DraftHead.attach(model, EAGLE)
    layout, tokens, loss_mask, hidden = _pack([5])
    targets = draft_targets(tokens, loss_mask, layout, 1)
    with pytest.raises(AssertionError):
        unroll(head, model.get_input_embeddings().weight, hidden, targets, layout)
    with pytest.raises(AssertionError):
        embed = model.get_input_embeddings().weight.detach()
        unroll(head, embed, hidden.requires_grad_(), targets, layout)
