from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from conftest import tiny_config, tiny_model
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE
from miles_spec.kernels.attention import PackedAttention
from miles_spec.kernels.layout import PackedLayout


def _seed(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _inputs(n: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PackedAttention]:
    embed, hidden = torch.randn(2, 1, n, 32, generator=_seed(5))
    layout = PackedLayout.make([n])
    return embed, hidden, layout.positions[None], PackedAttention(layout)


def test_attached_layer_is_the_targets_last_with_quiet_outputs(family: str) -> None:
    model = tiny_model(family)
    head = DraftHead.attach(model, EAGLE, generator=_seed())
    last = model.model.layers[-1]
    assert type(head.layer) is type(last)
    copied = dict(head.layer.named_parameters())
    assert copied.keys() == {n for n, _ in last.named_parameters() if "input_layernorm" not in n}
    for name, weight in last.named_parameters():
        if name in copied:
            quiet = "o_proj" in name or "down_proj" in name
            assert torch.equal(copied[name], weight * 0.01 if quiet else weight)
            assert copied[name].data_ptr() != weight.data_ptr()


def test_forward_is_the_fused_input_through_the_targets_layer(family: str) -> None:
    """With its input norm kept, a draft equals the target's own layer on `fc`'s output."""
    model = tiny_model(family)
    head = DraftHead.attach(model, replace(EAGLE, input_norm=True), generator=_seed())
    head.layer.load_state_dict(model.model.layers[-1].state_dict())
    embed, hidden, positions, attend = _inputs()
    with torch.no_grad():
        got = head(embed, hidden, positions, attend)
        x = torch.cat([embed, hidden], -1) @ head.fc.weight.T + head.fc.bias
        want = model.model.layers[-1](
            x,
            attention_mask=None,
            position_embeddings=model.model.rotary_emb(x, positions),
            attend=attend,
        )
    torch.testing.assert_close(got, want)


def test_concat_order_follows_the_spec() -> None:
    model = tiny_model()
    a, b = (
        DraftHead.attach(model, replace(EAGLE, concat=order), generator=_seed())
        for order in (("embed", "hidden"), ("hidden", "embed"))
    )
    rms = float(model.get_input_embeddings().weight.detach().square().mean().sqrt())
    for head, embed, hidden in ((a, slice(32), slice(32, 64)), (b, slice(32, 64), slice(32))):
        torch.testing.assert_close(head.fc.weight[:, embed].diag(), torch.full((32,), 0.7 / rms), rtol=0, atol=0.01)
        torch.testing.assert_close(head.fc.weight[:, hidden].diag(), torch.full((32,), 0.3), rtol=0, atol=0.01)
    with torch.no_grad():
        b.fc.weight.copy_(a.fc.weight.roll(32, dims=1))
    torch.testing.assert_close(a(*_inputs()), b(*_inputs()))


def test_attaching_is_deterministic() -> None:
    model = tiny_model()
    a, b, c = (DraftHead.attach(model, EAGLE, generator=_seed(s)).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["fc.weight"], c["fc.weight"])


def test_export_names(family: str) -> None:
    head = DraftHead.attach(tiny_model(family), EAGLE, torch.tensor([1, 5, 9]))
    names = head.export_names
    assert names.keys() == {n for n, _ in head.named_parameters()}
    assert len(set(names.values())) == len(names)
    assert names["fc.weight"] == "fc.weight" and names["fc.bias"] == "fc.bias"
    assert names["layer.self_attn.q_proj.weight"] == "layers.0.self_attn.q_proj.weight"
    assert names["layer.mlp.down_proj.weight"] == "layers.0.mlp.down_proj.weight"
    assert not any("input_layernorm" in n or "vocab" in n for n in names.values())
    kept = DraftHead(replace(EAGLE, input_norm=True, fc_bias=False), tiny_config(family)).export_names.values()
    assert "layers.0.input_layernorm.weight" in kept and "fc.bias" not in kept


def test_reduced_vocabulary() -> None:
    model = tiny_model()
    ids = torch.tensor([0, 3, 7, 60])
    head = DraftHead.attach(model, EAGLE, ids)
    weight = model.lm_head.weight
    rows = head.head_rows(weight)
    assert torch.equal(rows, weight[ids]) and not rows.requires_grad
    assert head.to_draft[ids].tolist() == [0, 1, 2, 3]
    assert (head.to_draft == -1).sum() == 61 - 4
    whole = DraftHead.attach(model, EAGLE)
    assert torch.equal(whole.to_draft, torch.arange(61)) and torch.equal(whole.head_rows(weight), weight)
    assert "vocab_ids" in head.state_dict() and "to_draft" not in head.state_dict()


@pytest.mark.parametrize("ids", [[], [3, 1], [1, 1], [-1, 2], [5, 61]])
def test_bad_vocabulary_is_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"0\.\.60"):
        DraftHead(EAGLE, tiny_config("llama"), torch.tensor(ids, dtype=torch.int64))


@pytest.mark.parametrize("change", [{"hidden": "pre_norm"}, {"final_norm": True}, {"shared_head": False}])
def test_a_family_it_cannot_hold_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not supported"):
        DraftHead(replace(EAGLE, **change), tiny_config("llama"))  # type: ignore[arg-type]


def test_rotary_table_survives_half_precision_and_meta() -> None:
    model = tiny_model("llama")
    head = DraftHead.attach(model, EAGLE, generator=_seed())
    exact = head.rotary.inv_freq.clone()
    half = copy.deepcopy(head).to(torch.bfloat16)
    assert half.fc.weight.dtype == torch.bfloat16
    assert half.rotary.inv_freq.dtype == torch.float32 and torch.equal(half.rotary.inv_freq, exact)
    with torch.device("meta"):
        blank = DraftHead(EAGLE, tiny_config("llama"))
    assert blank.fc.weight.is_meta
    blank.load_state_dict(head.state_dict(), assign=True)
    torch.testing.assert_close(blank(*_inputs()), head(*_inputs()), rtol=0, atol=0)


def test_a_copy_is_independent() -> None:
    head = DraftHead.attach(tiny_model(), EAGLE, torch.tensor([1, 2]), generator=_seed())
    twin = copy.deepcopy(head)
    before = twin(*_inputs())
    with torch.no_grad():
        for p in head.parameters():
            p.zero_()
    assert torch.equal(twin(*_inputs()), before) and not torch.equal(head(*_inputs()), before)
    assert torch.equal(twin.vocab_ids, torch.tensor([1, 2]))
