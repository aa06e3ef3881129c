"""What `export` writes comes back bit for bit, and what does not fit is refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import tiny_config, tiny_model, tiny_tokenizer
from miles_spec.draft.export import ORIGIN, TOKEN_MAP, export, tensors_of
from miles_spec.draft.load import inspect, load
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE, EAGLE3, MIMO, NEXTN, QWEN_MTP, DraftSpec

IDS = torch.tensor([3, 4, 17, 60])
CASES = [
    (EAGLE, "llama"),
    (EAGLE, "mistral"),
    (EAGLE, "qwen2"),
    (EAGLE, "qwen3"),
    (EAGLE3, "llama"),
    (EAGLE3, "qwen3"),
    (NEXTN, "glm4_moe"),
    (MIMO, "qwen2"),
    (QWEN_MTP, "qwen3_moe"),
]


def target(kind: str, spec: DraftSpec = EAGLE) -> Any:
    return tiny_model(kind, layers=8 if spec is EAGLE3 else 2)


def made(kind: str = "llama", spec: DraftSpec = EAGLE, ids: Tensor | None = None, layers: int = 1) -> DraftHead:
    head = DraftHead.attach(target(kind, spec), spec, ids, torch.Generator().manual_seed(0), layers)
    with torch.no_grad():
        for i, tensor in enumerate(tensors_of(head).values()):  # no two alike
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)))
    return head


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "reduced"])
@pytest.mark.parametrize(
    ("spec", "kind", "layers"),
    [*((*case, 1) for case in CASES), (NEXTN, "glm4_moe", 3), (MIMO, "qwen2", 2)],
    ids=lambda case: getattr(case, "family", case),
)
def test_what_is_written_comes_back(
    spec: DraftSpec, kind: str, layers: int, ids: Tensor | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    """And is the same folder, byte for byte, when it is written again."""
    head, tokenizer = made(kind, spec, ids, layers), tiny_tokenizer()
    export(head, tmp_path / "draft", dtype=dtype, tokenizer=tokenizer)
    again = load(tmp_path / "draft", target(kind, spec), tokenizer=tokenizer)
    assert again.spec is spec and again.layers == inspect(tmp_path / "draft").layers == layers
    assert again.aux_layers == head.aux_layers and again.target_type == kind
    assert (again.vocab_ids is None) == (ids is None) and torch.equal(again.to_draft, head.to_draft)
    ours, theirs = again.config.to_dict(), head.config.to_dict()
    assert {**ours, "dtype": 0, "tie_word_embeddings": 0} == {**theirs, "dtype": 0, "tie_word_embeddings": 0}
    got, want = tensors_of(again), tensors_of(head)
    assert got.keys() == want.keys()
    for name in got:
        cast = torch.float32 if name.endswith("e_score_correction_bias") else dtype
        assert got[name].dtype == torch.float32 and torch.equal(got[name], want[name].to(cast).float()), name
    export(again, tmp_path / "again", dtype=dtype, tokenizer=tokenizer)
    assert files(tmp_path / "again") == files(tmp_path / "draft")


@given(ids=st.sets(st.integers(0, 60), min_size=1), three=st.booleans())
@settings(max_examples=15, deadline=None)
def test_every_vocabulary_comes_back(ids: set[int], three: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, spec = tmp_path_factory.mktemp("draft") / "draft", EAGLE3 if three else EAGLE
    export(made("llama", spec, torch.tensor(sorted(ids))), folder, dtype=torch.float32)
    read = load(folder, target("llama", spec)).vocab_ids
    # all of them are no reduced vocabulary to EAGLE3, whose file then says the same
    assert sorted(ids) == (list(range(61)) if read is None else read.tolist())


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        change(values)
        (folder / "config.json").write_text(json.dumps(values))

    return run


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return run


def _cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])


NORM = "layers.0.post_attention_layernorm.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    "no tensors": (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors file; token_map.pt is a pi"),
    "truncated": (_cut, "model.safetensors is truncated"),
    "unknown": (_config(lambda c: c.update(architectures=["Medusa"])), "no draft of architecture 'Medusa' is known"),
    "no architecture": (_config(lambda c: c.pop("architectures")), "no draft of architecture None is known"),
    "missing": (_tensors(lambda t: t.pop(NORM)), f"tensor '{NORM}' is missing"),
    "no bias": (_tensors(lambda t: t.pop("fc.bias")), "tensor 'fc.bias' is missing"),
    "extra": (_tensors(lambda t: t.update({"layers.0.x": torch.ones(3)})), "tensor 'layers.0.x' has no place"),
    "prefixed": (_tensors(lambda t: t.update({"model." + NORM: t.pop(NORM)})), f"tensor '{NORM}' is missing"),
    "misshapen": (_tensors(lambda t: t.update({NORM: torch.ones(31)})), rf"tensor '{NORM}' is F32\[31\], not \[32\]"),
    "not finite": (_tensors(lambda t: t[NORM][3].fill_(float("nan"))), f"tensor '{NORM}' holds numbers that are not f"),
    "quantised": (_tensors(lambda t: t.update({NORM: t[NORM].char()})), f"tensor '{NORM}' is of dtype I8"),
    "another embedding": (
        _tensors(lambda t: t.update({"embed_tokens.weight": torch.ones(60, 32)})),
        r"tensor 'embed_tokens.weight' is \[60, 32\]; .* where it is \[61, 32\]",
    ),
    "hidden size": (_config(lambda c: c.update(hidden_size=64)), "hidden size 64, and the target's is 32"),
    "vocabulary": (_config(lambda c: c.update(vocab_size=99)), "of vocabulary 99, and the target's is 61"),
    "layers": (_config(lambda c: c.update(num_hidden_layers=2)), "num_hidden_layers is 2"),
    "heads": (_config(lambda c: c.update(num_key_value_heads=4)), r"k_proj.weight' is F32\[16, 32\], not \[32, 32\]"),
    "quantisation": (_config(lambda c: c.update(quantization_config={"a": 1})), "quantization_config is set"),
    "activation": (_config(lambda c: c.pop("model_type")), "config.json does not say model_type"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    spoil, says = FAULTS[fault]
    export(made(ids=IDS), tmp_path / "draft", dtype=torch.float32)
    load(tmp_path / "draft", target("llama"))
    spoil(tmp_path / "draft")
    with pytest.raises(ValueError, match=says) as error:
        load(tmp_path / "draft", target("llama"))
    assert str(tmp_path / "draft") in str(error.value)


def _shifted(tensors: dict[str, Tensor]) -> None:
    tensors["d2t"][2] += 1


THREE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "residual": (_config(lambda c: c.update(norm_before_residual=True)), "norm_before_residual is true"),
    "norm before fc": (_config(lambda c: c["eagle_config"].update(norm_before_fc=True)), "norm_before_fc is true"),
    "fc_norm": (_config(lambda c: c.update(fc_norm=True)), "fc_norm is true"),
    "output": (_config(lambda c: c.update(norm_output=True)), "norm_output is true"),
    "one state": (_config(lambda c: c["eagle_config"].update(use_aux_hidden_state=False)), "use_aux_hidden_state is f"),
    "fc bias": (_config(lambda c: c.update(bias=True)), "bias is true"),
    "layers": (_config(lambda c: c.update(num_hidden_layers=2)), "num_hidden_layers is 2"),
    "wider target": (_config(lambda c: c.update(target_hidden_size=64)), "target_hidden_size is 64 and hidden_size 32"),
    "layer": (_config(lambda c: c.update(model_type="qwen3")), "model_type is 'qwen3': no eagle3 draft"),
    "last layer": (
        _config(lambda c: c["eagle_config"].update(eagle_aux_hidden_state_layer_ids=[1, 3, 7])),
        r"three of 0\.\.6 in ascending order",
    ),
    "four": (_config(lambda c: c.update(num_aux_hidden_states=4)), "num_aux_hidden_states is 4"),
    "no d2t": (_tensors(lambda t: t.pop("d2t")), "draft_vocab_size is 4 of 61, and tensor 'd2t' is missing"),
    "short d2t": (_tensors(lambda t: t.update(d2t=t["d2t"][:3].clone())), r"'d2t' is I64\[3\], and draft_vocab_size i"),
    "absolute d2t": (
        _tensors(lambda t: t.update(d2t=IDS)),
        "'d2t' makes token ids that are not ascending within 0..60",
    ),
    "other t2d": (_tensors(_shifted), "'d2t' and 't2d' name different tokens"),
    "head": (_tensors(lambda t: t.update({"lm_head.weight": torch.ones(61, 32)})), r"lm_head.weight' is F32\[61, 32\]"),
    "no head": (_tensors(lambda t: t.pop("lm_head.weight")), "tensor 'lm_head.weight' is missing"),
}


@pytest.mark.parametrize("fault", THREE_FAULTS)
def test_what_eagle3_cannot_be_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    spoil, says = THREE_FAULTS[fault]
    export(made(spec=EAGLE3, ids=IDS), tmp_path / "draft", dtype=torch.float32)
    spoil(tmp_path / "draft")
    with pytest.raises(ValueError, match=says):
        load(tmp_path / "draft", target("llama", EAGLE3))


def test_a_draft_of_another_model_or_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    export(made(), tmp_path / "draft", dtype=torch.float32, tokenizer=tokenizer)
    load(tmp_path / "draft", target("llama"), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="for a llama model, and the target is a qwen3 model"):
        load(tmp_path / "draft", target("qwen3"))
    other = tiny_tokenizer()
    other.add_tokens(["more"])
    with pytest.raises(ValueError, match="for a tokenizer whose vocabulary has the SHA-256"):
        load(tmp_path / "draft", target("llama"), tokenizer=other)
    (tmp_path / "draft" / ORIGIN).unlink()  # as one from elsewhere
    load(tmp_path / "draft", target("qwen3"), tokenizer=other)


def test_a_head_without_bias_gets_zeros(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export(made(), tmp_path / "draft", dtype=torch.float32)
    _tensors(lambda t: t.pop("fc.bias"))(tmp_path / "draft")
    _config(lambda c: c.update(bias=False))(tmp_path / "draft")
    with caplog.at_level(logging.WARNING):
        head = load(tmp_path / "draft", target("llama"))
    assert not head.fc.bias.any() and "fc has no bias" in caplog.text


def test_copies_of_the_targets_weights_are_passed_over(tmp_path: Path) -> None:
    head = made()
    export(head, tmp_path / "draft", dtype=torch.float32)
    copies = {"embed_tokens.weight": torch.ones(61, 32), "lm_head.weight": torch.ones(61, 32)}
    _tensors(lambda t: t.update(copies))(tmp_path / "draft")
    assert torch.equal(load(tmp_path / "draft", target("llama")).fc.weight, head.fc.weight)


def test_a_draft_of_other_sizes_than_its_target(tmp_path: Path) -> None:
    """As public ones are: more key heads, a narrower product, another rotary base."""
    config = tiny_config("llama", num_hidden_layers=8, num_key_value_heads=4, intermediate_size=24, rope_theta=5e5)
    head = DraftHead(EAGLE3, config)
    export(head, tmp_path / "draft", dtype=torch.float32)
    again = load(tmp_path / "draft", target("llama", EAGLE3))
    assert again.layer.mlp.gate_proj.weight.shape == (24, 32)
    assert again.layer.self_attn.k_proj.weight.shape == (32, 64)
    assert torch.equal(again.rotary.inv_freq, head.rotary.inv_freq)
    assert not torch.equal(again.rotary.inv_freq, made(spec=EAGLE3).rotary.inv_freq)


@pytest.mark.parametrize(
    ("spec", "ids", "says"),
    [
        (EAGLE, None, ("eagle", "sglang", 61, (), ("embedding", "LM head"), "EAGLE", False)),
        (EAGLE, IDS, ("eagle", "sglang", 4, (), ("embedding", "LM head"), "EAGLE", True)),
        (EAGLE3, IDS, ("eagle3", "sglang", 4, (1, 3, 4), ("embedding",), "EAGLE3", False)),
    ],
)
def test_inspect(spec: DraftSpec, ids: Tensor | None, says: tuple[Any, ...], tmp_path: Path) -> None:
    head = made("llama", spec, ids)
    export(head, tmp_path / "draft", dtype=torch.bfloat16)
    told = inspect(tmp_path / "draft")
    token_map = "--speculative-token-map" in told.arguments
    assert (
        told.family, told.format, told.draft_vocab, told.aux_layers, told.shared, told.algorithm, token_map
    ) == says  # fmt: skip
    assert token_map == (tmp_path / "draft" / TOKEN_MAP).exists()
    assert (told.hidden, told.intermediate, told.heads, told.kv_heads, told.head_dim, told.vocab) == (
        32,
        48,
        4,
        2,
        8,
        61,
    )
    assert told.tensors["fc.weight"] == ("BF16", tuple(head.fc.weight.shape))
    assert told.parameters == sum(p.numel() for p in head.parameters())


def test_several_layers(tmp_path: Path) -> None:
    """Each is whole or the draft is refused; SGLang is told nothing of a draft that it does not serve."""
    folder = tmp_path / "draft"
    export(made("qwen2", MIMO, layers=3), folder, dtype=torch.float32)
    told = inspect(folder)
    assert (told.layers, told.arguments) == (3, ())
    config, whole = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (1, 3)
    name = "model.mtp_layers.2.input_proj.weight"
    _tensors(lambda t: t.pop(name))(folder)
    with pytest.raises(ValueError, match=f"tensor '{name}' is missing"):
        load(folder, target("qwen2"))
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    for count, says in (
        (2, r"tensor 'model\.mtp_layers\.2\..*' has no place"),
        (4, r"tensor 'model\.mtp_layers\.3\..*' is missing, and 15 others"),
        (-1, "num_nextn_predict_layers is -1: a number from 1 on is known"),
        ("2", "num_nextn_predict_layers is 2: a number from 1 on is known"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": count}))
        with pytest.raises(ValueError, match=says):
            load(folder, target("qwen2"))
    export(made("qwen3_moe", QWEN_MTP), tmp_path / "one", dtype=torch.float32)
    _config(lambda c: c.update(num_nextn_predict_layers=2))(tmp_path / "one")
    with pytest.raises(ValueError, match="num_nextn_predict_layers is 2: drafts of one are known"):
        load(tmp_path / "one", target("qwen3_moe"))


def test_inspect_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from miles_spec.draft.formats import Stored

    export(made("glm4_moe", NEXTN), tmp_path / "draft", dtype=torch.float32)
    monkeypatch.setattr(Stored, "read", lambda self: pytest.fail("read"))
    told = inspect(tmp_path / "draft")
    assert told.intermediate == 24 and told.architectures == ("Glm4MoeForCausalLMNextN",)
