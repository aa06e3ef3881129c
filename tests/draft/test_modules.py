from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, modeling_layers

from conftest import tiny_config, tiny_model
from miles_spec.draft.export import tensors_of
from miles_spec.draft.modules import DraftHead, default_aux_layers
from miles_spec.draft.spec import EAGLE, EAGLE3, FAMILIES, MIMO, NEXTN, QWEN_MTP, DraftSpec
from miles_spec.kernels.attention import PackedAttention
from miles_spec.kernels.layout import PackedLayout
from oracles import drafts
from oracles.numbers import relative_error
from oracles.serving import draft_states


def _seed(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _inputs(n: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PackedAttention]:
    embed, hidden = torch.randn(2, 1, n, 32, generator=_seed(5))
    layout = PackedLayout.make([n])
    return embed, hidden, layout.positions[None], PackedAttention(layout)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TARGETS: dict[str, dict[str, Any]] = {
    "llama": {
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "original_max_position_embeddings": 64,
            **LLAMA3,
        },
    },
    "qwen2": {},
    "qwen3": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    "gemma": {},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_next": {"head_dim": 16, "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "glm4_moe": {"routed_scaling_factor": 1.5},
}
"""Changes to tiny configurations: heads that are not `hidden / heads` wide, and rotary parameters of more kinds."""


def _random(spec: DraftSpec, config: Any, layers: int = 1) -> DraftHead:
    """In float64, with weights large enough that every part of the draft shows in its output."""
    torch.manual_seed(3)
    head = DraftHead(spec, config, layers=layers).double()
    with torch.no_grad():
        for name, tensor in head.state_dict().items():
            noise = torch.randn_like(tensor)
            if "norm" in name:
                tensor.add_(0.4 * noise)
            else:
                tensor.copy_(0.3 * noise)
    return head


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES)
def test_a_block_computes_what_was_published(spec: DraftSpec, target: str) -> None:
    """Four depths of blocks that start at several rows, from the tensors by their names in a checkpoint."""
    config = tiny_config(target, num_hidden_layers=4, **TARGETS[target])
    head = _random(spec, config)
    named = tensors_of(head)
    g = _seed(2)
    embedding, read = torch.randn(61, 32, generator=g).double(), torch.randn(14, head.width, generator=g).double()
    tokens = torch.randint(0, 61, (14,), generator=g)
    for row in (0, 1, 9):
        want = drafts.block(spec.family, named, drafts.Numbers.of(head.config), embedding, read, tokens, row, 4)
        with torch.no_grad():
            got = draft_states(head, embedding, read, tokens, row, 4)
        # norms, routers and rotary tables are float32
        assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 5e-6


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        (MIMO, {"first_embed": True}),
        (MIMO, {"concat": ("embed", "hidden")}),
        (NEXTN, {"feeds": "pre_norm"}),
        (EAGLE3, {"feeds": "post_norm"}),
        (EAGLE3, {"concat": ("hidden", "embed")}),
        (QWEN_MTP, {"concat": ("hidden", "embed")}),
    ],
)
def test_every_field_of_a_family_matters(spec: DraftSpec, changes: dict[str, Any]) -> None:
    """A family with one field wrong is far from what was published, at the second depth at the latest."""
    config = tiny_config("llama", num_hidden_layers=4)
    head, wrong = (_random(s, config) for s in (spec, replace(spec, **changes)))
    wrong.load_state_dict(head.state_dict())
    g = _seed(2)
    embedding, read = torch.randn(61, 32, generator=g).double(), torch.randn(5, head.width, generator=g).double()
    with torch.no_grad():
        right, other = (draft_states(h, embedding, read, torch.arange(5), 2, 2) for h in (head, wrong))
    assert relative_error(other[-1], right[-1]) > 1e-2


def test_a_row_at_position_0_reads_no_token_where_the_family_says_so() -> None:
    for spec in (MIMO, replace(MIMO, first_embed=True)):
        head = _random(spec, tiny_config("qwen2"))
        _, hidden, positions, attend = _inputs(1)
        with torch.no_grad():
            outs = [
                head(torch.full((1, 1, 32), value).double(), hidden.double(), positions + at, attend)[1]
                for at in (0, 1)
                for value in (1.0, torch.nan)
            ]
        assert torch.equal(outs[0], outs[1]) is not spec.first_embed
        assert outs[2].isfinite().all() and outs[3].isnan().any()


@pytest.mark.parametrize(
    "kind", ["qwen3_moe", "qwen3_next", "qwen3_5_text", "glm4_moe", "deepseek_v3", "gemma", "gemma3_text"]
)
@pytest.mark.parametrize("spec", [NEXTN, QWEN_MTP], ids=["nextn", "qwen_mtp"])
def test_a_layer_of_the_target_is_its_own_kind(kind: str, spec: DraftSpec) -> None:
    """Experts, latent attention, rotary embedding of a part of a head or by kind of layer, norms of one plus their
    weight: what the target's own last layer computes from `fc`'s output."""
    model = tiny_model(kind, torch.float64)
    head = _random(spec, model.config)
    last = model.model.layers[-1]
    assert type(head.layer) is type(last) and type(head.layer.mlp) is type(last.mlp)
    assert head.layer.state_dict().keys() == last.state_dict().keys()
    last.load_state_dict(head.layer.state_dict())
    embed, hidden, positions, attend = _inputs()
    embed, hidden = embed.double(), hidden.double()
    with torch.no_grad():
        after, got = head(embed, hidden, positions, attend)
        norms = [type(model.model.norm)(32, eps=model.config.rms_norm_eps).double() for _ in range(3)]
        for norm, own in zip(norms, (head.embed_norm, head.hidden_norm, head.norm), strict=True):
            norm.load_state_dict(own.state_dict())
        x = torch.cat([norms[0](embed), norms[1](hidden)], -1) @ head.fc.weight.T
        table = {"layer_type": model.config.layer_types[-1]} if kind == "gemma3_text" else {}
        rotary = model.model.rotary_emb(x, positions, **table)
        x = last(x, attention_mask=None, position_ids=positions, position_embeddings=rotary, attend=attend)
        want = norms[2](x)
    assert after is got
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not hasattr(modeling_layers, "MtpModel"), reason="this version of transformers has no such module")
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3"])
def test_nextn_equals_the_mtp_module_of_transformers(kind: str, layers: int) -> None:
    """Which counts positions from the token, so it is one further: rotary embeddings are relative."""
    torch.manual_seed(5)
    config = tiny_config(kind, num_mtp_layers=layers)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    theirs = modeling_layers.MtpModel(model, layers).double().eval()
    head = _random(NEXTN, model.config, layers)
    names = {
        "embed_norm.": "enorm.",
        "hidden_norm.": "hnorm.",
        "fc.": "eh_proj.",
        "norm.": "post_norm.",
        "layer.": "mtp_block.",
    }
    for own, their in zip(head.parts, theirs.layers, strict=True):
        state = {}
        for name, tensor in own.state_dict().items():
            if not name.startswith("deeper."):
                ours, part = next((a, b) for a, b in names.items() if name.startswith(a))
                state[part + name.removeprefix(ours)] = tensor
        their.load_state_dict(state)
    layout = PackedLayout.make([11])
    g = _seed(8)
    ids = torch.randint(0, 61, (1, 11), generator=g)
    hidden = torch.randn(1, 11, 32, generator=g).double()
    positions = layout.positions[None]
    got = want = hidden
    with torch.no_grad():
        for d in range(layers):
            want = theirs.forward_layer(d, want, positions + d + 1, None, input_ids=ids)
            embed = model.model.embed_tokens(ids)
            got, _ = head(embed, got, positions + d, PackedAttention(layout), d + 1)
            assert relative_error(got, want) < 4e-6
            ids = ids.roll(-1)


@pytest.mark.parametrize("kind", ["gemma", "gemma3_text", "glm4_moe", "deepseek_v3"])
@pytest.mark.parametrize("spec", [EAGLE, EAGLE3], ids=["eagle", "eagle3"])
def test_engines_have_classes_for_a_llamas_layer(kind: str, spec: DraftSpec) -> None:
    """Where the target's layer is of a kind of its own, such a draft has a Llama's: all of a head is rotated, by the
    target's angles, and the gate goes through SiLU."""
    config = tiny_config(kind, num_hidden_layers=4)
    head = DraftHead(spec, config)
    assert head.config.model_type == "llama" and head.config.hidden_act == "silu"
    rotary = config.rope_parameters.get("full_attention", config.rope_parameters)
    assert head.config.rope_parameters["rope_theta"] == rotary["rope_theta"]
    assert head(*_inputs())[1].shape == (1, 6, 32)


@pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES)
def test_a_layers_number_does_not_matter(spec: DraftSpec) -> None:
    """Targets whose first layers have no experts, in whatever way they say so, have drafts with experts."""
    for changes in ({"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}):
        head = DraftHead(spec, tiny_config("qwen3_moe", num_hidden_layers=4, **changes))
        assert hasattr(head.layer.mlp, "experts") == (spec.layer == "target")


def test_default_auxiliary_layers() -> None:
    assert [default_aux_layers(n) for n in (4, 5, 6, 7, 32, 61)] == [
        (0, 1, 2),
        (0, 1, 3),
        (0, 2, 4),
        (1, 2, 3),
        (1, 15, 28),
        (1, 29, 57),
    ]
    with pytest.raises(ValueError, match="at least 4, not 3"):
        default_aux_layers(3)
    assert DraftHead(EAGLE3, tiny_config("llama", num_hidden_layers=9)).aux_layers == (1, 3, 5)


@pytest.mark.parametrize("layers", [(0, 1), (0, 1, 2, 3), (2, 1, 0), (0, 1, 1), (-1, 0, 1), (1, 2, 5), (2, 3, 4, 5)])
def test_bad_auxiliary_layers_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"three of 0\.\.4"):
        DraftHead(EAGLE3, tiny_config("llama", num_hidden_layers=6), aux_layers=layers)
    with pytest.raises(ValueError, match="'eagle' reads no auxiliary layers"):
        DraftHead(EAGLE, tiny_config("llama"), aux_layers=(0, 1, 2))


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (EAGLE, "fc.weight fc.bias layers.0.self_attn.q_proj.weight layers.0.post_attention_layernorm.weight"),
        (
            EAGLE3,
            "fc.weight norm.weight lm_head.weight midlayer.hidden_norm.weight midlayer.input_layernorm.weight "
            "midlayer.self_attn.q_proj.weight midlayer.post_attention_layernorm.weight",
        ),
        (
            NEXTN,
            "model.layers.0.enorm.weight model.layers.0.hnorm.weight model.layers.0.eh_proj.weight "
            "model.layers.0.shared_head.norm.weight model.layers.0.input_layernorm.weight "
            "model.layers.0.self_attn.q_proj.bias model.layers.0.mlp.gate.e_score_correction_bias",
        ),
        (
            MIMO,
            "model.mtp_layers.0.token_layernorm.weight model.mtp_layers.0.hidden_layernorm.weight "
            "model.mtp_layers.0.input_proj.weight model.mtp_layers.0.final_layernorm.weight "
            "model.mtp_layers.0.input_layernorm.weight model.mtp_layers.0.self_attn.q_proj.bias",
        ),
        (
            QWEN_MTP,
            "mtp.fc.weight mtp.pre_fc_norm_embedding.weight mtp.pre_fc_norm_hidden.weight mtp.norm.weight "
            "mtp.layers.0.self_attn.q_norm.weight mtp.layers.0.input_layernorm.weight",
        ),
    ],
    ids=FAMILIES,
)
def test_names_are_those_of_the_checkpoints(spec: DraftSpec, wanted: str) -> None:
    kind = {"nextn": "glm4_moe", "mimo": "qwen2", "qwen_mtp": "qwen3_moe"}.get(spec.family, "llama")
    head = DraftHead(spec, tiny_config(kind, num_hidden_layers=4), torch.tensor([1, 5, 9]))
    names = head.export_names
    assert names.keys() == head.state_dict().keys() - {"vocab_ids"} >= {n for n, _ in head.named_parameters()}
    assert len(set(names.values())) == len(names)
    assert set(wanted.split()) <= set(names.values())
    assert ("fc.bias" in names) == (spec is EAGLE)
    # the layer's own input norm is there where the family keeps it
    inputs = [n for n in names.values() if n.endswith("input_layernorm.weight")]
    assert len(inputs) == (spec is not EAGLE) and ("layer.input_layernorm.weight" in names) == spec.input_norm


@pytest.mark.parametrize(("spec", "kind", "prefix"), [(NEXTN, "glm4_moe", "layers"), (MIMO, "qwen2", "mtp_layers")])
def test_a_layer_for_each_depth(spec: DraftSpec, kind: str, prefix: str) -> None:
    """Names with the layer's number, the first as if it were alone; deeper depths apply the last one."""
    one, three = (DraftHead(spec, tiny_config(kind), layers=n) for n in (1, 3))
    names = set(one.export_names.values())
    assert set(three.export_names.values()) == {
        n.replace(f"model.{prefix}.0.", f"model.{prefix}.{i}.") for n in names for i in range(3)
    }
    assert {n for n in three.export_names if not n.startswith("deeper.")} == one.export_names.keys()
    embed, hidden, positions, attend = _inputs()
    three = _random(spec, tiny_config(kind), 3).float()
    outs = [three(embed, hidden, positions, attend, depth)[1] for depth in (1, 2, 3, 4, 9)]
    assert [torch.equal(a, b) for a, b in pairwise(outs)] == [False, False, True, True]


def test_layers_that_a_family_cannot_have_are_refused() -> None:
    for spec in (EAGLE, EAGLE3, QWEN_MTP):
        with pytest.raises(ValueError, match=f"family '{spec.family}' has one layer, not 2"):
            DraftHead(spec, tiny_config("llama", num_hidden_layers=4), layers=2)
    with pytest.raises(ValueError, match="family 'mimo' has at least one layer, not 0"):
        DraftHead(MIMO, tiny_config("qwen2"), layers=0)


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
    torch.testing.assert_close(blank(*_inputs())[1], head(*_inputs())[1], rtol=0, atol=0)


def test_a_copy_is_independent() -> None:
    head = DraftHead.attach(tiny_model(), EAGLE, torch.tensor([1, 2]), generator=_seed())
    twin = copy.deepcopy(head)
    _, before = twin(*_inputs())
    with torch.no_grad():
        for p in head.parameters():
            p.zero_()
    assert torch.equal(twin(*_inputs())[1], before) and not torch.equal(head(*_inputs())[1], before)
    assert torch.equal(twin.vocab_ids, torch.tensor([1, 2]))
