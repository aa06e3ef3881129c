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
from miles_spec.draft.export import ARCHITECTURES, HEAD, TOKEN_MAP, export, export_target, served_tensors
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE

IDS = torch.tensor([3, 4, 17, 60])


def _head(family: str = "llama", vocab_ids: torch.Tensor | None = None) -> DraftHead:
    return DraftHead.attach(tiny_model(family), EAGLE, vocab_ids, torch.Generator().manual_seed(0))


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
    assert read.architectures == [ARCHITECTURES[family]]
    assert read.num_hidden_layers == 1 and len(getattr(read, "layer_types", None) or [0]) == 1
    # SGLang must find two places in the draft for the target's embedding and its head
    assert read.tie_word_embeddings is False
    ours = {"architectures", "num_hidden_layers", "layer_types", "tie_word_embeddings", "dtype", "_name_or_path"}
    before, after = target.to_dict(), read.to_dict()
    assert {n: v for n, v in after.items() if n not in ours} == {n: v for n, v in before.items() if n not in ours}
    written = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert written["vocab_size"] == 61 and written["rope_parameters"]["rope_theta"] == 12345.0
    assert written["tie_word_embeddings"] is False


@pytest.mark.parametrize("family", ["qwen3", "gemma"])
def test_a_family_without_a_class_is_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no class for an eagle draft of a {family} model, only of llama, mistral, q"):
        export(_head(family), tmp_path / "draft", dtype=torch.float32)
    assert not list(tmp_path.iterdir())


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
