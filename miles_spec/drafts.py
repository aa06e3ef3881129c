"""`miles-spec draft attach`, `import`, `export` and `inspect`: drafts as folders, from and to whoever reads them.

Invariant: a command that fails leaves nothing behind, and none replaces a folder that is there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from miles_spec import checkpoint, models, settings
from miles_spec.config import DataConfig, DraftConfig, ModelConfig, RunConfig
from miles_spec.data import Record, read, tokenize
from miles_spec.draft import formats
from miles_spec.draft.export import TARGETS
from miles_spec.draft.export import export as to_sglang
from miles_spec.draft.load import Inspection, inspect, load
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import FAMILIES, DraftSpec
from miles_spec.draft_data import names_of
from miles_spec.first_draft import fresh_draft, given_draft, most_frequent
from miles_spec.plugins import suggest

FORMATS = ("sglang", "specforge", "speculators")

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""As safetensors names them."""


def attach(
    model: str,
    out: Path,
    *,
    family: str = "eagle",
    layers: int = 1,
    vocab_size: int = 0,
    vocab_data: Path | None = None,
    seed: int = 0,
    dtype: str = "auto",
) -> Inspection:
    """Writes a fresh draft for `model`, a Hugging Face folder or `smollm2`, to the folder `out`.

    With several `layers`, of a family that may have them, each of the first depths has one of its own.
    With `vocab_size` it drafts over that many tokens: the most frequent ones of `vocab_data`, then the lowest. `dtype`
    `auto` is the model's. Raises `ValueError` for a model without such a draft, or data that cannot be counted.
    """
    _check_new(out)
    if family not in FAMILIES:
        known = suggest(family, FAMILIES) or f"; there are {', '.join(FAMILIES)}"
        raise ValueError(f'there is no draft family "{family}"{known}')
    if vocab_size < 0:
        raise ValueError(f"a draft cannot have {vocab_size} tokens; give --vocab-size a number above 0")
    if (vocab_size > 0) != (vocab_data is not None):
        lacking = "--vocab-data, to count them in" if vocab_size > 0 else "--vocab-size, how many tokens to draft over"
        raise ValueError(f"a reduced vocabulary needs {lacking}")
    loaded = _load_model(model)
    check_written(loaded, FAMILIES[family])
    models.check_draftable(loaded.model)
    ids = None
    if vocab_data is not None:
        ids = most_frequent(_texts(vocab_data, loaded.tokenizer), vocab_size, loaded.model.config.vocab_size)
    config = RunConfig(seed=seed, draft=DraftConfig(family=family, layers=layers))  # type: ignore[arg-type]
    head = fresh_draft(config, loaded, ids)
    to_sglang(head, out, dtype=_dtype(dtype) or _model_dtype(model), tokenizer=loaded.tokenizer, fresh=True)
    return inspect(out)


def import_(folder: Path, out: Path, *, model: str, dtype: str = "auto") -> Inspection:
    """Writes the draft for `model` in `folder`, of any format that `load` reads, to `out` as SGLang takes it.

    `dtype` `auto` keeps the one that it has. Raises `ValueError` as `load` does.
    """
    return export(folder, out, model=model, dtype=dtype)


def export(source: Path, out: Path, *, model: str = "", format: str = "sglang", dtype: str = "auto") -> Inspection:
    """Writes the draft in `source`, a draft's folder or a run's directory, to `out` in one of `FORMATS`.

    Of a run it is the draft of the newest checkpoint, and `model` may be left out. `dtype` `auto` keeps that of a
    folder, and takes that of the model for a run. Raises `ValueError` as `load` does, for a run without a draft, and
    for a family that the format does not have.
    """
    _check_new(out)
    if (source / "config.toml").is_file():
        head, loaded = _of_run(source, model)
        head.fresh = False
        chosen = _dtype(dtype) or _model_dtype(loaded.model.config.name_or_path)
    else:
        if not model:
            raise ValueError(f"--model is missing: name the model that {source} is a draft of")
        chosen = _dtype(dtype) or _folder_dtype(inspect(source))
        loaded = _load_model(model)
        head = load(source, loaded.model, tokenizer=loaded.tokenizer)
    if format == "specforge":
        formats.to_specforge(head, out, dtype=chosen)
    elif format == "speculators":
        formats.to_speculators(head, out, dtype=chosen, verifier=loaded.model)
    else:
        to_sglang(head, out, dtype=chosen, tokenizer=loaded.tokenizer, fresh=head.fresh)
    return inspect(out)


def check_written(loaded: models.Loaded, spec: DraftSpec) -> None:
    """Raises `ValueError` for a draft of which no folder can be written."""
    kind, served = loaded.model.config.model_type, TARGETS[spec.family]
    if kind not in served:
        raise ValueError(
            f"a draft's folder is written for SGLang, which serves drafts of family {spec.family} for "
            f"{', '.join(served)} models, not for {kind}; only a run with the embedded engine can have one"
        )


def describe(found: Inspection) -> str:
    """What `inspect` found, for a terminal."""
    dtypes = Counter(dtype for dtype, _ in found.tensors.values())
    rows = {
        "family": found.family,
        "format": f"{found.format} ({', '.join(found.architectures) or 'no architecture named'})",
        "layers": f"{found.layers}, one for each depth, the last for all deeper ones" if found.layers > 1 else "",
        "layer": f"hidden {found.hidden}, intermediate {found.intermediate}, {found.heads} heads of {found.head_dim}, "
        f"{found.kv_heads} of keys and values",
        "vocabulary": f"{found.vocab}"
        + (f", drafts over {found.draft_vocab}" if found.draft_vocab != found.vocab else ""),
        "reads": f"layers {', '.join(map(str, found.aux_layers))} of the target" if found.aux_layers else "",
        "shares": f"the target's {' and '.join(found.shared)}" if found.shared else "nothing with the target",
        "parameters": f"{found.parameters:,} in {len(found.tensors)} tensors, {' and '.join(dtypes)}",
        "SGLang": " ".join(found.arguments) or "serves no such draft with several layers; the embedded engine does",
    }
    lines = [f"{name:<12}{text}" for name, text in rows.items() if text]
    shapes = _shapes(found.tensors)
    width = max(map(len, shapes), default=0)
    return "\n".join([*lines, "", *(f"  {name:<{width}}  {text}" for name, text in shapes.items())])


def _shapes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, str]:
    """One line per tensor; experts of the same shape share one."""
    counts = Counter((re.sub(r"\.experts\.\d+\.", ".experts.*.", name), *of) for name, of in tensors.items())
    return {
        name: f"{dtype} {list(shape)}" + (f" x {count}" if count > 1 else "")
        for (name, dtype, shape), count in counts.items()
    }


def _check_new(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there already; remove it, or choose another folder")


def _load_model(path: str) -> models.Loaded:
    return models.load(ModelConfig(path=path, device="cpu", dtype="float32"))


def _dtype(name: str) -> torch.dtype | None:
    """None for `auto`."""
    return None if name == "auto" else getattr(torch, name)


def _model_dtype(path: str) -> torch.dtype:
    """What the model's folder says it is in; bfloat16 if it says nothing."""
    folder = models.smollm2_folder() if path == models.SMOLLM2 else Path(path).expanduser()
    return AutoConfig.from_pretrained(folder).dtype or torch.bfloat16


def _folder_dtype(found: Inspection) -> torch.dtype:
    """What most of the draft's weights are in."""
    sizes: Counter[str] = Counter()
    for dtype, shape in found.tensors.values():
        sizes[dtype] += torch.Size(shape).numel()
    return DTYPES[sizes.most_common(1)[0][0]]


def _of_run(out: Path, model: str) -> tuple[DraftHead, models.Loaded]:
    """The draft of the newest checkpoint of the run in `out`, and its target, as it was before the run."""
    config = settings.load(out / "config.toml")
    if not config.draft.enabled:
        raise ValueError(f"the run in {out} has no draft: draft.enabled is false")
    saved = checkpoint.load_latest(out)
    if saved is None:
        raise ValueError(f"{out} has no checkpoint to take a draft from")
    chosen = replace(config.model, path=model or config.model.path, device="cpu", dtype="float32")
    loaded = models.load(chosen)
    trained = {name: t.shape for name, t in saved.tensors.items() if name.startswith("policy.")}
    own = {f"policy.{name}": t.shape for name, t in models.stored_tensors(loaded.model).items()}
    if trained and trained != own:
        raise ValueError(f"the run in {out} trained another model than {chosen.path}: their tensors differ")
    head = given_draft(config, loaded)
    if head is None:
        head = fresh_draft(config, loaded, saved.tensors.get("draft.vocab_ids"))
    for name, tensor in head.state_dict().items():
        kept = saved.tensors.get(f"draft.{name}")
        if kept is None or kept.shape != tensor.shape:
            raise ValueError(f"{saved.path} has no tensor 'draft.{name}' of shape {list(tensor.shape)}")
        tensor.copy_(kept)
    return head, loaded


def _texts(path: Path, tokenizer: Any) -> Iterator[tuple[int, ...]]:
    """The tokens of each record of the user's data."""
    data = DataConfig(source=str(path), chat_template=bool(tokenizer.chat_template))
    records = read(data, 0)
    for name, record in zip(names_of(data.source, len(records)), records, strict=True):
        yield _tokens(record, data, tokenizer, name)


def _tokens(record: Record, data: DataConfig, tokenizer: Any, name: str) -> tuple[int, ...]:
    if "messages" in record:
        try:
            return tuple(tokenizer.apply_chat_template(record["messages"], tokenize=True, return_dict=False))
        except Exception as error:  # a template refuses by raising; which errors, Jinja and the template decide
            raise ValueError(f"the chat template refuses the messages of {name}: {error}") from error
    if "text" not in record and "prompt" not in record:
        raise ValueError(
            f"{name} has none of the fields messages, text and prompt, only {', '.join(map(str, record)) or 'none'}"
        )
    prompt = () if "text" in record else tokenize(record["prompt"], data, tokenizer, name)
    text = record["text"] if "text" in record else record.get("response", "")
    if not isinstance(text, str):
        raise ValueError(f"the text or response of {name} is not text but of type {type(text).__name__}")
    return (*prompt, *tokenizer.encode(text, add_special_tokens=False))
