from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from conftest import tiny_config, tiny_model, tiny_tokenizer
from miles_spec.draft import export as exporting
from miles_spec.draft.export import (
    ARCHITECTURES,
    HEAD,
    ORIGIN,
    TARGETS,
    TOKEN_MAP,
    algorithm,
    check_served,
    export,
    export_target,
    fingerprint,
    served_target,
    served_tensors,
)
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE, EAGLE3, FAMILIES, MIMO, NEXTN, QWEN_MTP, DraftSpec

IDS = torch.tensor([3, 4, 17, 60])
OTHERS = [(EAGLE3, "llama"), (NEXTN, "glm4_moe"), (NEXTN, "deepseek_v3"), (MIMO, "qwen2"), (QWEN_MTP, "qwen3_moe")]


def _head(family: str = "llama", vocab_ids: torch.Tensor | None = None, spec: DraftSpec = EAGLE) -> DraftHead:
    layers = 4 if spec is EAGLE3 else 2
    return DraftHead.attach(tiny_model(family, layers=layers), spec, vocab_ids, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tensors_come_back_under_their_names(family: str, tmp_path: Path) -> None:
    head = _head(family)
    export(head, tmp_path / "draft", dtype=torch.float32)
    read = load_file(tmp_path / "draft" / "model.safetensors")
    assert read.keys() == set(head.export_names.values())
    assert {"fc.weight", "fc.bias", "layers.0.mlp.down_proj.weight"} <= read.keys()
    assert ("layers.0.self_attn.q_proj.bias" in read) == (family == "qwen2")
    for name, parameter in head.named_parameters():
        assert torch.equal(read[head.export_names[name]], parameter)


def test_they_are_cast_to_the_servers_dtype(tmp_path: Path) -> None:
    head = _head()
    export(head, tmp_path / "draft", dtype=torch.bfloat16)
    read = load_file(tmp_path / "draft" / "model.safetensors")
    assert torch.equal(read["fc.weight"], head.fc.weight.bfloat16()) and head.fc.weight.dtype == torch.float32
    assert AutoConfig.from_pretrained(tmp_path / "draft").dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_configuration_is_the_targets_with_one_layer(family: str, tmp_path: Path) -> None:
    """`AutoConfig`, by which SGLang reads it, gives the target's values, its class's defaults or not."""
    rope = {"rope_type": "default", "rope_theta": 12345.0}
    more = dict(rope_parameters=rope, rms_norm_eps=3e-5, sliding_window=None)
    target = tiny_config(family, tie_word_embeddings=True, **more)
    export(DraftHead(EAGLE, target), tmp_path / "draft", dtype=torch.float32)
    read = AutoConfig.from_pretrained(tmp_path / "draft")
    assert type(read) is type(target)
    assert read.architectures == [ARCHITECTURES["eagle", family]]
    written = json.loads((tmp_path / "draft" / "config.json").read_text())
    # with either of these SGLang would take it for another family
    assert not written.keys() & {"draft_vocab_size", "num_nextn_predict_layers", "eagle_config"}
    assert read.num_hidden_layers == 1 and len(getattr(read, "layer_types", None) or [0]) == 1
    # SGLang must find two places in the draft for the target's embedding and its head
    assert read.tie_word_embeddings is False
    ours = {"architectures", "num_hidden_layers", "layer_types", "tie_word_embeddings", "dtype", "_name_or_path"}
    before, after = target.to_dict(), read.to_dict()
    assert {n: v for n, v in after.items() if n not in ours} == {n: v for n, v in before.items() if n not in ours}
    written = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert written["vocab_size"] == 61 and written["rope_parameters"]["rope_theta"] == 12345.0
    assert written["tie_word_embeddings"] is False


def test_eagle3s_configuration(tmp_path: Path) -> None:
    """A target of 8 layers: outputs of 1, 3 and 4 counted from 0, as SGLang's field has them."""
    for target in ("llama", "qwen3"):
        for ids, size in ((None, 61), (IDS, 4)):
            head = DraftHead(EAGLE3, tiny_config(target, num_hidden_layers=8), ids)
            export(head, tmp_path / "draft", dtype=torch.float32)
            written = json.loads((tmp_path / "draft" / "config.json").read_text())
            assert written["eagle_config"] == {
                "eagle_aux_hidden_state_layer_ids": [1, 3, 4],
                "use_aux_hidden_state": True,
            }
            assert (written["draft_vocab_size"], written["vocab_size"]) == (size, 61)
            assert (written["model_type"], written["architectures"]) == ("llama", ["LlamaForCausalLMEagle3"])
            assert written["tie_word_embeddings"] is False and written["norm_output"] is False
            assert written["num_hidden_layers"] == 1 and "num_nextn_predict_layers" not in written


def test_eagle3_has_no_biases_whatever_its_target_has(tmp_path: Path) -> None:
    head = DraftHead(EAGLE3, tiny_config("llama", num_hidden_layers=4, attention_bias=True, mlp_bias=True))
    export(head, tmp_path / "draft", dtype=torch.float32)
    assert not [name for name in load_file(tmp_path / "draft" / "model.safetensors") if "bias" in name]
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["attention_bias"] is False


@pytest.mark.parametrize(("spec", "kind"), [case for case in OTHERS if case[0] is not EAGLE3])
def test_configuration_of_mtp_layers(spec: DraftSpec, kind: str, tmp_path: Path) -> None:
    export(_head(kind, spec=spec), tmp_path / "draft", dtype=torch.float32)
    written = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert (written["num_hidden_layers"], written["num_nextn_predict_layers"]) == (1, 1)
    assert (written["model_type"], written["architectures"]) == (kind, [ARCHITECTURES[spec.family, kind]])
    assert "draft_vocab_size" not in written and "eagle_config" not in written
    if spec is NEXTN:
        assert written["first_k_dense_replace"] == 0 and written["n_routed_experts"] == 4


def test_what_sglang_reads_and_transformers_does_not_write(tmp_path: Path) -> None:
    """In target and draft; what a checkpoint says of it stays."""
    said = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    model = tiny_model("deepseek_v3")
    for changes in ({}, {"topk_method": "other"}):
        for name, value in changes.items():
            setattr(model.config, name, value)
        export_target(model, tiny_tokenizer(), tmp_path / "target", dtype=torch.float32)
        export(DraftHead(NEXTN, model.config), tmp_path / "draft", dtype=torch.float32)
        for folder in ("target", "draft"):
            written = json.loads((tmp_path / folder / "config.json").read_text())
            assert {name: written.get(name) for name in said} == {**said, **changes}


def test_eagle3s_vocabulary_is_in_its_file(tmp_path: Path) -> None:
    export(_head(vocab_ids=IDS, spec=EAGLE3), tmp_path / "draft", dtype=torch.bfloat16)
    read = load_file(tmp_path / "draft" / "model.safetensors")
    assert read["d2t"].dtype == torch.int64 and read["t2d"].dtype == torch.bool
    assert (read["d2t"] + torch.arange(4)).tolist() == read["t2d"].nonzero()[:, 0].tolist() == IDS.tolist()
    assert read["lm_head.weight"].shape == (4, 32) and len(read["t2d"]) == 61
    assert not (tmp_path / "draft" / TOKEN_MAP).exists()
    export(_head(spec=EAGLE3), tmp_path / "draft", dtype=torch.float32)
    assert not load_file(tmp_path / "draft" / "model.safetensors").keys() & {"d2t", "t2d"}


@pytest.mark.parametrize(("spec", "kind"), OTHERS)
def test_what_is_served_is_what_is_written(spec: DraftSpec, kind: str, tmp_path: Path) -> None:
    head = _head(kind, IDS, spec)
    export(head, tmp_path / "draft", dtype=torch.float32)
    read = load_file(tmp_path / "draft" / "model.safetensors")
    served = dict(served_tensors(head, torch.randn(61, 32)))
    assert served.keys() ^ read.keys() == ({"d2t", "t2d"} if spec.own_head else {HEAD})
    assert all(torch.equal(served[name], read[name]) for name in served.keys() & read.keys())


@pytest.mark.parametrize("kind", ["glm4_moe", "qwen3_moe", "qwen3_next", "deepseek_v3"])
def test_experts_come_one_by_one_as_transformers_writes_them(kind: str, tmp_path: Path) -> None:
    """transformers' own conversion on the way to a checkpoint is the oracle; a router's bias is in it."""
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    served = dict(served_target(model))
    assert served.keys() == written.keys() and any(".experts.3.up_proj" in name for name in served)
    assert all(torch.equal(served[name], written[name]) for name in written)


def test_experts_are_views(tmp_path: Path) -> None:
    head = _head("glm4_moe", spec=NEXTN)
    served = dict(served_tensors(head, torch.randn(61, 32)))
    with torch.no_grad():
        head.layer.mlp.experts.gate_up_proj.fill_(5)
        head.layer.mlp.gate.e_score_correction_bias.fill_(7)
    assert (served["model.layers.0.mlp.experts.2.gate_proj.weight"] == 5).all()
    assert (served["model.layers.0.mlp.gate.e_score_correction_bias"] == 7).all()
    export(head, tmp_path / "draft", dtype=torch.bfloat16)
    read = load_file(tmp_path / "draft" / "model.safetensors")
    assert read["model.layers.0.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert read["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16


def test_the_folder_says_what_target_it_is_for(tmp_path: Path) -> None:
    head, tokenizer = DraftHead(EAGLE, tiny_config("qwen3"), IDS), tiny_tokenizer()
    export(head, tmp_path / "draft", dtype=torch.float32, tokenizer=tokenizer)
    origin = json.loads((tmp_path / "draft" / ORIGIN).read_text())
    target = {"model_type": "qwen3", "hidden_size": 32, "vocab_size": 61, "tokenizer": fingerprint(tokenizer)}
    assert origin == {"family": "eagle", "fresh": False, "target": target, "vocab_ids": IDS.tolist()}


def test_the_fingerprint_is_of_the_vocabulary() -> None:
    class Words:
        def __init__(self, words: dict[str, int]) -> None:
            self.get_vocab = lambda: words

    same = fingerprint(Words({"a": 0, "b": 1})), fingerprint(Words({"b": 1, "a": 0}))
    assert same[0] == same[1] != fingerprint(Words({"a": 1, "b": 0}))
    assert len(same[0]) == 64


@pytest.mark.parametrize(
    ("spec", "kind", "says"),
    [
        (EAGLE, "gemma", "family 'eagle' for glm4_moe, .*llama, .*, not for gemma"),
        (EAGLE3, "gemma", "family 'eagle3' for .*, not for gemma"),
        (EAGLE, "qwen3_next", "family 'eagle' for .*, not for qwen3_next"),
        (NEXTN, "llama", "family 'nextn' for deepseek_v3, glm4_moe models, not for llama"),
        (MIMO, "qwen3", "family 'mimo' for qwen2 models, not for qwen3"),
        (QWEN_MTP, "qwen3_next", "family 'qwen_mtp' for qwen3_moe models, not for qwen3_next"),
    ],
)
def test_a_target_that_cannot_be_served_is_refused(spec: DraftSpec, kind: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        check_served(kind, spec)
    with pytest.raises(ValueError, match=says):
        export(_head(kind, spec=spec), tmp_path / "draft", dtype=torch.float32)
    assert not list(tmp_path.iterdir())


def test_a_target_that_takes_no_push_is_refused_for_every_draft() -> None:
    """Qwen3-Next's norms are changed as SGLang loads them."""
    for spec in FAMILIES.values():
        with pytest.raises(ValueError, match="not for qwen3_next"):
            check_served("qwen3_next", spec)


def test_several_layers_are_not_served() -> None:
    for spec, kind in ((NEXTN, "glm4_moe"), (NEXTN, "deepseek_v3"), (MIMO, "qwen2")):
        check_served(kind, spec, 1)
        with pytest.raises(ValueError, match=f"family '{spec.family}' with one layer, .* a layer for each of 2 depths"):
            check_served(kind, spec, 2)


def test_every_target_has_a_class_for_its_draft() -> None:
    for family, kinds in TARGETS.items():
        for kind in kinds:
            check_served(kind, FAMILIES[family])
            if kind != "gpt_oss":
                config = tiny_config(kind)
                config.num_hidden_layers = 4
                assert (family, DraftHead(FAMILIES[family], config).config.model_type) in ARCHITECTURES
    assert [algorithm(spec) for spec in FAMILIES.values()] == ["EAGLE", "EAGLE3", "EAGLE", "EAGLE", "EAGLE"]


def test_a_draft_built_otherwise_is_refused(tmp_path: Path) -> None:
    head = DraftHead(replace(EAGLE, input_norm=True), tiny_config("llama"))
    with pytest.raises(ValueError, match="as it is built here"):
        export(head, tmp_path / "draft", dtype=torch.float32)


def test_reduced_vocabulary_is_a_token_map(tmp_path: Path) -> None:
    export(_head(vocab_ids=IDS), tmp_path / "draft", dtype=torch.float32)
    read = torch.load(tmp_path / "draft" / TOKEN_MAP, weights_only=True)  # as SGLang reads it
    assert type(read) is list and torch.equal(torch.tensor(read, dtype=torch.int64), IDS)
    export(_head(), tmp_path / "draft", dtype=torch.float32)
    assert not (tmp_path / "draft" / TOKEN_MAP).exists()


def test_served_tensors_are_the_drafts_and_its_rows_of_the_head() -> None:
    head, weight = _head(vocab_ids=IDS), torch.nn.Parameter(torch.randn(61, 32))
    served = list(served_tensors(head, weight))
    assert [name for name, _ in served] == [*head.export_names.values(), HEAD]
    assert not any(tensor.requires_grad for _, tensor in served)
    assert torch.equal(served[-1][1], weight[IDS])
    assert served[0][1].data_ptr() == next(head.parameters()).data_ptr()
    assert [name for name, _ in served_tensors(_head(), weight)] == list(head.export_names.values())


@pytest.mark.parametrize("there", [True, False])
def test_a_write_that_fails_leaves_what_was_there(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "draft"
    if there:
        export(_head(), folder, dtype=torch.float32)

    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(exporting, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        export(_head("qwen2"), folder, dtype=torch.bfloat16)
    assert list(tmp_path.iterdir()) == ([folder] if there else [])
    if there:
        assert load_file(folder / "model.safetensors")["fc.weight"].dtype == torch.float32


def test_a_newer_export_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    export(_head(vocab_ids=IDS), folder, dtype=torch.float32)
    export(_head("qwen2"), folder, dtype=torch.float32)
    assert AutoConfig.from_pretrained(folder).model_type == "qwen2"
    assert list(tmp_path.iterdir()) == [folder]


def test_targets_folder_has_everything_but_weights(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    model.generation_config = GenerationConfig(eos_token_id=[2, 5])
    export_target(model, tokenizer, tmp_path / "target", dtype=torch.bfloat16)
    assert not [p for p in (tmp_path / "target").iterdir() if p.suffix in (".safetensors", ".bin", ".pt")]
    read = AutoConfig.from_pretrained(tmp_path / "target")
    assert read.architectures == ["Qwen2ForCausalLM"] and read.dtype == torch.bfloat16
    assert read.tie_word_embeddings is True and read.num_hidden_layers == 2
    assert GenerationConfig.from_pretrained(tmp_path / "target").eos_token_id == [2, 5]
    messages = [{"role": "user", "content": "hé"}]
    again = AutoTokenizer.from_pretrained(tmp_path / "target")
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    built = AutoModelForCausalLM.from_config(read)
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_no_trace_of_how_the_weights_were_stored(tmp_path: Path) -> None:
    """A model that transformers read from GGUF says so in its configuration, and SGLang would believe it."""
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "gguf"}
    model.config._name_or_path = "/somewhere/else"
    model.config.architectures = None
    head = DraftHead(EAGLE, model.config)
    export_target(model, tiny_tokenizer(), tmp_path / "target", dtype=torch.float32)
    export(head, tmp_path / "draft", dtype=torch.float32)
    for name, architecture in (("target", "LlamaForCausalLM"), ("draft", "LlamaForCausalLMEagle")):
        text = (tmp_path / name / "config.json").read_text()
        assert json.loads(text)["architectures"] == [architecture]
        assert not any(word in text for word in ("gguf", "quantization", "_attn_implementation", "somewhere"))


def test_safetensors_metadata_says_torch(tmp_path: Path) -> None:
    """Readers of Hugging Face folders refuse a file without it."""
    export(_head(), tmp_path / "draft", dtype=torch.float32)
    with safe_open(tmp_path / "draft" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
