"""Checkpoints of others, in both directions; layouts and conventions are theirs as published."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import tiny_model
from miles_spec.draft.export import tensors_of
from miles_spec.draft.formats import to_specforge, to_speculators
from miles_spec.draft.load import inspect, load
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE, EAGLE3, MIMO, NEXTN, QWEN_MTP, DraftSpec

IDS = torch.tensor([3, 4, 17, 60])
LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.0",
}
"""A configuration as transformers 4 wrote it."""


def target(layers: int = 8) -> Any:
    return tiny_model("llama", layers=layers)


def made(spec: DraftSpec = EAGLE3, ids: Tensor | None = None) -> DraftHead:
    head = DraftHead.attach(target(), spec, ids, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, tensor in enumerate(tensors_of(head).values()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)))
    return head


def written(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], parts: int = 1) -> Path:
    """A folder of others; in `parts` files with an index if more than one."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if parts == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {name: f"model-{i % parts}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def same(head: DraftHead, other: DraftHead) -> bool:
    a, b = tensors_of(head), tensors_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) and head.aux_layers == other.aux_layers


def layer_tensors(prefix: str, wide: bool, seed: int = 0) -> dict[str, Tensor]:
    """A Llama's layer of `LLAMA`, without its input norm, random."""
    generator = torch.Generator().manual_seed(seed)
    width = 64 if wide else 32
    shapes = {
        "self_attn.q_proj": (32, width),
        "self_attn.k_proj": (16, width),
        "self_attn.v_proj": (16, width),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (48, 32),
        "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48),
        "post_attention_layernorm": (32,),
    }
    return {f"{prefix}{n}.weight": torch.randn(shape, generator=generator) for n, shape in shapes.items()}


def specforge_tensors(layer: str = "midlayer.") -> dict[str, Tensor]:
    """As SpecForge's trainer saves them: `embed_tokens` left out, maps in, over a vocabulary of 4."""
    t2d = torch.zeros(61, dtype=torch.bool)
    t2d[IDS] = True
    return {
        **layer_tensors(layer, wide=True),
        f"{layer}input_layernorm.weight": torch.randn(32),
        f"{layer}hidden_norm.weight": torch.randn(32),
        "fc.weight": torch.randn(32, 96),
        "norm.weight": torch.randn(32),
        "lm_head.weight": torch.randn(4, 32),
        "t2d": t2d,
        "d2t": IDS - torch.arange(4),
    }


SPECFORGE = {**LLAMA, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 4, "tie_word_embeddings": False}


@pytest.mark.parametrize("prefix", ["midlayer.", "layers.0.", "model.midlayer."])
def test_a_draft_of_specforge(prefix: str, tmp_path: Path) -> None:
    tensors = specforge_tensors(prefix)
    head = load(written(tmp_path / "draft", SPECFORGE, tensors), target())
    assert head.spec is EAGLE3 and head.vocab_ids is not None and head.vocab_ids.tolist() == IDS.tolist()
    assert head.aux_layers == (1, 3, 4)  # outputs of N/2 - 1 and N - 4 of 8 layers, as no field says
    assert head.config.rope_parameters["rope_theta"] == 500000.0
    assert torch.equal(head.layer.self_attn.q_proj.weight, tensors[f"{prefix}self_attn.q_proj.weight"])
    assert torch.equal(head.embed_norm.weight, tensors[f"{prefix}input_layernorm.weight"])
    assert torch.equal(head.hidden_norm.weight, tensors[f"{prefix}hidden_norm.weight"])
    told = inspect(tmp_path / "draft")
    assert (told.format, told.family, told.draft_vocab, told.vocab) == ("specforge", "eagle3", 4, 61)


def test_layers_that_specforge_names(tmp_path: Path) -> None:
    named = {**SPECFORGE, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [5, 0, 2], "use_aux_hidden_state": True}}
    assert load(written(tmp_path / "draft", named, specforge_tensors()), target()).aux_layers == (0, 2, 5)
    with pytest.raises(ValueError, match=r"three of 0\.\.4"):  # SpecForge's own choice needs 7
        load(written(tmp_path / "small", SPECFORGE, specforge_tensors()), target(layers=6))


def test_a_head_that_is_the_targets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`draft_vocab_size: null`: SGLang serves the target's head."""
    tensors = {n: t for n, t in specforge_tensors().items() if n not in ("lm_head.weight", "d2t", "t2d")}
    model = target()
    with caplog.at_level(logging.INFO):
        head = load(written(tmp_path / "draft", {**SPECFORGE, "draft_vocab_size": None}, tensors), model)
    assert head.lm_head is not None and torch.equal(head.lm_head.weight, model.lm_head.weight)
    assert "starts with the target's" in caplog.text
    assert inspect(tmp_path / "draft").shared == ("embedding", "LM head")


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "reduced"])
def test_to_specforge_and_back(ids: Tensor | None, tmp_path: Path) -> None:
    head = made(EAGLE3, ids)
    to_specforge(head, tmp_path / "draft", dtype=torch.float32)
    read = load_file(tmp_path / "draft" / "model.safetensors")
    count = 61 if ids is None else 4
    # what its own exporter asks for
    assert {"fc.weight", "norm.weight", "lm_head.weight", "t2d", "d2t", "midlayer.hidden_norm.weight"} <= read.keys()
    assert read["d2t"].shape == (count,) and read["t2d"].sum() == count and "embed_tokens.weight" not in read
    assert inspect(tmp_path / "draft").format == "specforge"
    assert same(load(tmp_path / "draft", target()), head)
    with pytest.raises(ValueError, match="SpecForge has drafts of the family eagle3, not eagle"):
        to_specforge(made(EAGLE), tmp_path / "other", dtype=torch.float32)


def speculators_config(**changes: Any) -> dict[str, Any]:
    layer = {n: v for n, v in LLAMA.items() if n != "torch_dtype"}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.1.0",
        "draft_vocab_size": 4,
        "norm_before_residual": False,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": None,
        "transformer_layer_config": layer,
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "x", "architectures": []}},
        **changes,
    }


def test_an_eagle3_of_speculators(tmp_path: Path) -> None:
    """It saves the embedding, and counts states, the embedding's first."""
    tensors = {**specforge_tensors("layers.0."), "embed_tokens.weight": torch.randn(61, 32)}
    head = load(written(tmp_path / "draft", speculators_config(), tensors), target())
    assert head.aux_layers == (1, 3, 4)
    assert torch.equal(head.layer.self_attn.q_proj.weight, tensors["layers.0.self_attn.q_proj.weight"])
    named = speculators_config(eagle_aux_hidden_state_layer_ids=[1, 3, 6])
    assert load(written(tmp_path / "named", named, tensors), target()).aux_layers == (0, 2, 5)
    assert inspect(tmp_path / "named").format == "speculators"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"norm_before_residual": True}, "norm_before_residual is true"),
        ({"norm_before_fc": True}, "norm_before_fc is true"),
        ({"fc_norm": True}, "fc_norm is true"),
        ({"norm_output": True}, "norm_output is true"),
        ({"target_hidden_size": 64}, "target_hidden_size is 64"),
        ({"speculators_model_type": "dflash"}, "speculators_model_type is 'dflash', and only eagle and eagle3"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}, r"three of 0\.\.6"),
        ({"transformer_layer_config": {**LLAMA, "model_type": "qwen3"}}, "model_type is 'qwen3'"),
        ({"transformer_layer_config": {**LLAMA, "num_hidden_layers": 2}}, "num_hidden_layers is 2"),
        ({"transformer_layer_config": None}, "no transformer_layer_config"),
    ],
)
def test_what_speculators_has_and_we_do_not(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "draft", speculators_config(**changes), specforge_tensors("layers.0."))
    with pytest.raises(ValueError, match=says):
        load(folder, target())


def test_a_silent_norm_before_residual_is_refused(tmp_path: Path) -> None:
    """vLLM takes its absence for true, speculators' own default is false."""
    config = speculators_config()
    del config["norm_before_residual"]
    with pytest.raises(ValueError, match="does not say norm_before_residual"):
        load(written(tmp_path / "draft", config, specforge_tensors("layers.0.")), target())


@pytest.mark.parametrize("bias", [True, False])
def test_an_eagle_of_speculators(bias: bool, tmp_path: Path) -> None:
    tensors = {**layer_tensors("transformer.", wide=False), "fusion_fc.weight": torch.randn(32, 64)}
    if bias:
        tensors["fusion_fc.bias"] = torch.randn(32)
    layer = {n: v for n, v in LLAMA.items() if n != "torch_dtype"}
    config = {
        "architectures": ["EagleSpeculator"],
        "speculators_model_type": "eagle",
        "transformer_layer_architecture": "LlamaDecoderLayer",
        "layernorms": False,
        "fusion_bias": bias,
        "transformer_layer_config": layer,
        "speculators_config": {},
    }
    head = load(written(tmp_path / "draft", config, tensors), target())
    assert head.spec is EAGLE and torch.equal(head.fc.weight, tensors["fusion_fc.weight"])
    assert torch.equal(head.fc.bias, tensors["fusion_fc.bias"] if bias else torch.zeros(32))
    assert torch.equal(head.layer.mlp.up_proj.weight, tensors["transformer.mlp.up_proj.weight"])
    (tmp_path / "draft" / "config.json").write_text(json.dumps({**config, "layernorms": True}))
    with pytest.raises(ValueError, match="layernorms is true"):
        load(tmp_path / "draft", target())


@pytest.mark.parametrize(("spec", "ids"), [(EAGLE3, None), (EAGLE3, IDS), (EAGLE, None)])
def test_to_speculators_and_back(spec: DraftSpec, ids: Tensor | None, tmp_path: Path) -> None:
    head = made(spec, ids)
    to_speculators(head, tmp_path / "draft", dtype=torch.float32, verifier=target())
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["architectures"] == ["LlamaForCausalLM"]
    assert config["transformer_layer_config"]["num_hidden_layers"] == 1 and "model_type" not in config
    if spec is EAGLE3:
        assert config["norm_before_residual"] is False
        assert config["eagle_aux_hidden_state_layer_ids"] == [layer + 1 for layer in head.aux_layers]
    else:
        assert config["fusion_bias"] is True and config["layernorms"] is False
    assert same(load(tmp_path / "draft", target()), head)


def test_what_speculators_cannot_take_is_refused(tmp_path: Path) -> None:
    for head in (made(EAGLE, IDS), DraftHead.attach(tiny_model("qwen2"), MIMO)):
        with pytest.raises(ValueError, match="speculators has drafts of the families eagle and eagle3"):
            to_speculators(head, tmp_path / "draft", dtype=torch.float32, verifier=target())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bias", [True, False])
def test_an_eagle_of_its_authors(bias: bool, tmp_path: Path) -> None:
    """Their architecture is the target's, and `bias` says whether `fc` has one."""
    tensors = {
        **layer_tensors("layers.0.", wide=False),
        "fc.weight": torch.randn(32, 64),
        "embed_tokens.weight": torch.randn(61, 32),
    }
    if bias:
        tensors["fc.bias"] = torch.randn(32)
    config = {**LLAMA, "architectures": ["LlamaForCausalLM"], **({} if bias else {"bias": False})}
    head = load(written(tmp_path / "draft", config, tensors, parts=3), target())
    assert torch.equal(head.fc.bias, tensors["fc.bias"] if bias else torch.zeros(32))
    assert torch.equal(head.layer.self_attn.v_proj.weight, tensors["layers.0.self_attn.v_proj.weight"])


def test_an_index_whose_files_or_tensors_are_not_there(tmp_path: Path) -> None:
    config = {**LLAMA, "architectures": ["LlamaForCausalLMEagle"]}
    tensors = {**layer_tensors("layers.0.", wide=False), "fc.weight": torch.ones(32, 64), "fc.bias": torch.ones(32)}
    folder = written(tmp_path / "draft", config, tensors, parts=2)
    load(folder, target())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["norm.weight"] = "model-0.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"tensor 'norm.weight' of model.safetensors.index.json is in no file"):
        load(folder, target())
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no model-1.safetensors, which the index names"):
        load(folder, target())


INSIDE = [
    (NEXTN, "glm4_moe", "model.layers.2."),
    (NEXTN, "deepseek_v3", "model.layers.2."),
    (MIMO, "qwen2", "model.mtp_layers.0."),
    (QWEN_MTP, "qwen3_moe", "mtp."),
    (QWEN_MTP, "qwen3_next", "mtp."),
]


def model_folder(spec: DraftSpec, kind: str, prefix: str, folder: Path, layers: int = 1) -> DraftHead:
    """The model's folder as transformers writes it, with MTP layers in shards beside; that draft."""
    model = tiny_model(kind)
    model.save_pretrained(folder)
    head = DraftHead.attach(model, spec, None, torch.Generator().manual_seed(1), layers)
    own = spec.name_of("layer.").removesuffix("layers.0.") if spec is QWEN_MTP else spec.name_of("layer.")
    mtp = {prefix + name.removeprefix(own): t.clone() for name, t in tensors_of(head).items() if name.startswith(own)}
    for at in range(1, layers):  # those of the model's two layers go on
        ours, theirs = own.replace("0", str(at)), prefix.replace("2", str(2 + at)).replace("0", str(at))
        found = {n.removeprefix(ours): t.clone() for n, t in tensors_of(head).items() if n.startswith(ours)}
        mtp |= {theirs + name: tensor for name, tensor in found.items()}
    if spec is NEXTN:  # as DeepSeek-V3 and GLM-4.5 ship them
        mtp |= {
            prefix + "embed_tokens.weight": torch.ones(61, 32),
            prefix + "shared_head.head.weight": torch.ones(61, 32),
        }
    tensors = load_file(folder / "model.safetensors") | mtp
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    if layers > 1:
        config["num_nextn_predict_layers"] = layers
    if spec is MIMO:
        config |= {"model_type": "mimo", "architectures": ["MiMoForCausalLM"]}
    written(folder / "whole", config, tensors, parts=3)
    return head


@pytest.mark.parametrize(("spec", "kind", "prefix"), INSIDE, ids=[case[1] for case in INSIDE])
def test_an_mtp_layer_inside_a_model(spec: DraftSpec, kind: str, prefix: str, tmp_path: Path) -> None:
    head = model_folder(spec, kind, prefix, tmp_path)
    assert same(load(tmp_path / "whole", tiny_model(kind)), head)
    told = inspect(tmp_path / "whole")
    assert (told.format, told.family, told.vocab) == ("model", spec.family, 61)
    assert all(name.startswith(prefix) for name in told.tensors)
    with pytest.raises(ValueError, match="target"):
        load(tmp_path / "whole", tiny_model("llama", layers=4))


@pytest.mark.parametrize(("spec", "kind", "prefix"), INSIDE[:3], ids=[case[1] for case in INSIDE[:3]])
def test_several_mtp_layers_inside_a_model(spec: DraftSpec, kind: str, prefix: str, tmp_path: Path) -> None:
    head = model_folder(spec, kind, prefix, tmp_path, layers=3)
    again = load(tmp_path / "whole", tiny_model(kind))
    assert again.layers == 3 and same(again, head)
    assert inspect(tmp_path / "whole").layers == 3
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    for count, says in (
        (2, "weight' is of MTP layer 3, and num_nextn_predict_layers is 2"),
        (4, r"\.3\..* is missing"),
    ):
        text = json.dumps({**config, "num_nextn_predict_layers": count})
        (tmp_path / "whole" / "config.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            load(tmp_path / "whole", tiny_model(kind))


def test_a_model_without_an_mtp_layer(tmp_path: Path) -> None:
    tiny_model("glm4_moe").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no tensor is called model\.layers\.2\.\*"):
        load(tmp_path, tiny_model("glm4_moe"))


def test_a_second_mtp_layer_is_refused(tmp_path: Path) -> None:
    model_folder(*INSIDE[2], tmp_path)
    save_file({"model.mtp_layers.1.input_proj.weight": torch.ones(32, 64)}, tmp_path / "whole" / "mtp.safetensors")
    with pytest.raises(ValueError, match=r"'model\.mtp_layers\.1\.input_proj\.weight' is of MTP layer 2, and num_nex"):
        load(tmp_path / "whole", tiny_model("qwen2"))
