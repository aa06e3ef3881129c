"""The closed form of `fc` against normal equations that are summed up row by row in pure Python."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from conftest import tiny_config
from distributed import Ranks
from miles_spec.draft.linear_fit import RIDGE, LinearFit
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE, FAMILIES, MIMO
from miles_spec.kernels.layout import PackedLayout

LENGTHS = [5, 1, 9, 2, 14]


def _head(family: str, layers: int = 1) -> DraftHead:
    config = tiny_config("llama", vocab_size=31, hidden_size=8, head_dim=2)
    torch.manual_seed(3)
    head = DraftHead(FAMILIES[family], config, layers=layers)
    for name, parameter in head.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return head


def _data() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(4)
    total = sum(LENGTHS)
    return torch.randn(31, 8), torch.randn(total, 8), torch.randint(31, (total,))


def _expected(head: DraftHead, embed: Tensor, states: Tensor, tokens: Tensor) -> Tensor:
    """`[H, W]`."""
    inputs, outputs, start = [], [], 0
    for length in LENGTHS:
        for t in range(start, start + length - 1):
            token = embed[tokens[t + 1]]
            if head.spec is MIMO and t == start:
                token = torch.zeros_like(token)
            parts = {"embed": head.embed_norm(token), "hidden": head.hidden_norm(states[t])}
            row = torch.cat([parts[name] for name in head.spec.concat]).double()
            inputs.append(torch.cat([row, torch.ones(int(head.spec.fc_bias), dtype=torch.float64)]))
            outputs.append(states[t + 1].double())
        start += length
    x, y = torch.stack(inputs), torch.stack(outputs)
    gram = x.T @ x
    penalty = torch.full((len(gram),), RIDGE * float(gram.diagonal()[:16].mean()), dtype=torch.float64)
    penalty[16:] = 0
    return torch.linalg.solve(gram + penalty.diag(), x.T @ y).T


@pytest.mark.parametrize("family", ["eagle", "nextn", "mimo"])
@torch.no_grad()
def test_it_is_the_ridge_regression_of_the_next_state(family: str) -> None:
    head, (embed, states, tokens) = _head(family), _data()
    expected = _expected(head, embed, states, tokens)
    fit = LinearFit(head)
    # in two packs
    cut, layouts = sum(LENGTHS[:2]), [PackedLayout.make(LENGTHS[:2]), PackedLayout.make(LENGTHS[2:])]
    fit.add(embed, states[cut:], tokens[cut:], layouts[1])
    fit.add(embed, states[:cut], tokens[:cut], layouts[0])
    fit.finish()
    torch.testing.assert_close(head.fc.weight.double(), expected[:, :16], rtol=0, atol=1e-5)
    if head.spec is EAGLE:
        torch.testing.assert_close(head.fc.bias.double(), expected[:, 16], rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_depth_of_a_draft_with_several_layers_starts_from_it() -> None:
    head, (embed, states, tokens) = _head("nextn", layers=2), _data()
    fit = LinearFit(head)
    fit.add(embed, states, tokens, PackedLayout.make(LENGTHS))
    fit.finish()
    first, second = (part.fc.weight for part in head.parts)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


@torch.no_grad()
def test_it_recovers_a_linear_target_and_leaves_a_draft_without_rows_alone() -> None:
    head = _head("eagle")
    before = head.fc.weight.clone()
    fit = LinearFit(head)
    embed = torch.randn(31, 8)
    fit.add(embed, torch.randn(3, 8), torch.tensor([1, 2, 3]), PackedLayout.make([1, 1, 1]))
    fit.finish()
    assert torch.equal(head.fc.weight, before)
    true, states = torch.randn(8, 16) / 4, [torch.randn(8)]
    tokens = torch.randint(31, (4000,))
    for token in tokens[1:]:
        states.append(true @ torch.cat([embed[token], states[-1]]))
    fit.add(embed, torch.stack(states), tokens, PackedLayout.make([4000]))
    fit.finish()
    assert (head.fc.weight - true).norm() < 0.02 * true.norm() and head.fc.bias.abs().max() < 0.01


def _on_rank(group: dist.ProcessGroup, split: bool) -> Tensor:
    head, (embed, states, tokens) = _head("eagle"), _data()
    fit = LinearFit(head)
    if split:  # the vocabulary, with a token that nobody names
        embed = torch.cat([embed, torch.zeros(1, 8)]).chunk(group.size())[group.rank()]
        fit.add(embed, states, tokens, PackedLayout.make(LENGTHS), group)
        fit.finish()
    else:
        layout = PackedLayout.make(LENGTHS, halo=2, cp_group=group)
        fit.add(embed, layout.shard(states), layout.shard(tokens), layout)
        fit.finish(group)
    return head.fc.weight.detach()


@pytest.mark.parametrize("split", [False, True], ids=["cp", "tp"])
def test_ranks_change_nothing_but_rounding(split: bool, ranks: Ranks) -> None:
    head, (embed, states, tokens) = _head("eagle"), _data()
    fit = LinearFit(head)
    fit.add(embed, states, tokens, PackedLayout.make(LENGTHS))
    fit.finish()
    for found in ranks.run(_on_rank, 2, split):
        torch.testing.assert_close(found, head.fc.weight.detach(), rtol=0, atol=1e-6)
