"""The closed form against normal equations of inputs that are put together row by row in pure Python."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from conftest import tiny_config
from distributed import Ranks
from miles_spec.draft.linear_fit import RIDGE, LinearFit
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE, FAMILIES, MIMO
from miles_spec.kernels.layout import PackedLayout

LENGTHS = [5, 1, 9, 2, 14]


def _head(family: str, layers: int = 1, **sizes: int) -> DraftHead:
    shape = {"hidden_size": 8, "head_dim": 2, "num_hidden_layers": 4, **sizes}
    config = tiny_config("llama", vocab_size=31, **shape)
    torch.manual_seed(3)
    head = DraftHead(FAMILIES[family], config, layers=layers)
    for name, parameter in head.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return head


def _data(width: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embedding, the states that a draft reads, those after the final norm, and tokens."""
    torch.manual_seed(4)
    total = sum(LENGTHS)
    states = torch.randn(total, width) * torch.logspace(-1, 1, width)
    return torch.randn(31, 8), states, states if width == 8 else torch.randn(total, 8), torch.randint(31, (total,))


def _rows(head: DraftHead, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs `[n, W]` and what they are to give, `[n, H]`."""
    embed, states, hidden, tokens = data
    inputs, outputs, start = [], [], 0
    for length in LENGTHS:
        for t in range(start, start + length - 1):
            token = embed[tokens[t + 1]]
            if head.spec is MIMO and t == start:
                token = torch.zeros_like(token)
            parts = {"embed": head.embed_norm(token), "hidden": states[t]}
            if head.spec.joins == "projection":
                parts["hidden"] = head.hidden_norm(states[t])
            row = torch.cat([parts[name] for name in head.spec.concat]).double()
            inputs.append(torch.cat([row, torch.ones(int(head.spec.fc_bias), dtype=torch.float64)]))
            outputs.append(hidden[t + 1].double())
        start += length
    return torch.stack(inputs), torch.stack(outputs)


def _ridge(x: Tensor, y: Tensor, inputs: int) -> Tensor:
    """`[H, W]`."""
    gram = x.T @ x
    penalty = RIDGE * gram.diagonal()
    penalty[inputs:] = 0
    return torch.linalg.solve(gram + penalty.diag(), x.T @ y).T


@pytest.mark.parametrize("family", ["eagle", "nextn", "mimo"])
@torch.no_grad()
def test_it_is_the_ridge_regression_of_the_next_state(family: str) -> None:
    head, data = _head(family), _data()
    embed, states, hidden, tokens = data
    expected = _ridge(*_rows(head, data), 16)
    fit = LinearFit(head)
    # in two packs
    cut, layouts = sum(LENGTHS[:2]), [PackedLayout.make(LENGTHS[:2]), PackedLayout.make(LENGTHS[2:])]
    fit.add(embed, states[cut:], hidden[cut:], tokens[cut:], layouts[1])
    fit.add(embed, states[:cut], hidden[:cut], tokens[:cut], layouts[0])
    fit.finish()
    torch.testing.assert_close(head.fc.weight.double(), expected[:, :16], rtol=0, atol=1e-5)
    if head.spec is EAGLE:
        torch.testing.assert_close(head.fc.bias.double(), expected[:, 16], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids=lambda n: f"rank {2 * n} of 8")
@torch.no_grad()
def test_in_an_attention_it_is_as_much_of_the_regression_as_values_can_hold(kv_heads: int) -> None:
    head, data = _head("eagle3", num_key_value_heads=kv_heads), _data(24)
    embed, states, hidden, tokens = data
    head.layer.mlp.down_proj.weight.zero_()  # as good as it is in a fresh draft
    fit = LinearFit(head)
    fit.add(embed, states, hidden, tokens, PackedLayout.make(LENGTHS))
    fit.finish()
    x, y = _rows(head, data)
    solved = _ridge(x, y, 32)
    token, rest = x[:, :8] @ solved[:, :8].T, x[:, 8:] @ solved[:, 8:].T
    main = torch.linalg.svd(token).Vh[: 2 * kv_heads]
    # each row alone, so that it has but itself to attend to
    embed, read = (part[:, None].float() for part in (_tokens(data), x[:, 8:]))
    alone = torch.zeros(len(x), 1, dtype=torch.int64)
    state, out = head(
        embed, head.enter(read), alone, lambda layer, q, k, v, scale: v.repeat_interleave(4 // kv_heads, 1)
    )
    torch.testing.assert_close(state[:, 0].double(), rest + token @ main.T @ main, rtol=0, atol=1e-4)
    torch.testing.assert_close(out[:, 0], F.rms_norm(state[:, 0], (8,), eps=1e-6) * head.norm.weight[0])


def _tokens(data: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """`[n, H]` the embeddings that rows read."""
    embed, _, _, tokens = data
    return torch.cat([embed[part[1:]] for part in tokens.split(LENGTHS)])


@torch.no_grad()
def test_a_row_attends_to_itself() -> None:
    """Among a hundred that come before it, at the sizes of a head of a real model."""
    head = _head("eagle3", hidden_size=256, head_dim=64, num_attention_heads=4, num_key_value_heads=2)
    head.embed_norm.weight.fill_(1)
    fit = LinearFit(head)
    embed, states, hidden = torch.randn(31, 256), torch.randn(40, 768), torch.randn(40, 256)
    fit.add(embed, states, hidden, torch.randint(31, (40,)), PackedLayout.make([40]))
    fit.finish()
    weights = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        scores = q @ k.repeat_interleave(2, 1).mT * scale
        weights.append(scores.masked_fill(torch.ones(100, 100).triu(1).bool(), -torch.inf).softmax(-1))
        return weights[-1] @ v.repeat_interleave(2, 1)

    head(torch.randn(1, 100, 256), torch.randn(1, 100, 256), torch.arange(100)[None], attend)
    own = weights[0].diagonal(dim1=-2, dim2=-1)[..., 50:]
    assert own.mean() > 0.8 and own.min() > 0.3


@torch.no_grad()
def test_every_depth_of_a_draft_with_several_layers_starts_from_it() -> None:
    head, data = _head("nextn", layers=2), _data()
    fit = LinearFit(head)
    fit.add(*data, PackedLayout.make(LENGTHS))
    fit.finish()
    first, second = (part.fc.weight for part in head.parts)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


@torch.no_grad()
def test_it_recovers_a_linear_target_and_leaves_a_draft_without_rows_alone() -> None:
    head = _head("eagle")
    before = head.fc.weight.clone()
    fit = LinearFit(head)
    embed = torch.randn(31, 8)
    states = torch.randn(3, 8)
    fit.add(embed, states, states, torch.tensor([1, 2, 3]), PackedLayout.make([1, 1, 1]))
    fit.finish()
    assert torch.equal(head.fc.weight, before)
    true, chain = torch.randn(8, 16) / 4, [torch.randn(8)]
    tokens = torch.randint(31, (4000,))
    for token in tokens[1:]:
        chain.append(true @ torch.cat([embed[token], chain[-1]]))
    states = torch.stack(chain)
    fit.add(embed, states, states, tokens, PackedLayout.make([4000]))
    fit.finish()
    assert (head.fc.weight - true).norm() < 0.02 * true.norm() and head.fc.bias.abs().max() < 0.01


def _on_rank(group: dist.ProcessGroup) -> Tensor:
    head, (embed, states, hidden, tokens) = _head("eagle"), _data()
    fit = LinearFit(head)
    layout = PackedLayout.make(LENGTHS, halo=2, cp_group=group)
    fit.add(embed, *map(layout.shard, (states, hidden, tokens)), layout)
    fit.finish(group)
    return head.fc.weight.detach()


def test_ranks_change_nothing_but_rounding(ranks: Ranks) -> None:
    head, data = _head("eagle"), _data()
    fit = LinearFit(head)
    fit.add(*data, PackedLayout.make(LENGTHS))
    fit.finish()
    for found in ranks.run(_on_rank, 2):
        torch.testing.assert_close(found, head.fc.weight.detach(), rtol=0, atol=1e-6)
