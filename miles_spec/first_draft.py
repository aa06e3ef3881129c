"""The draft that a run begins with, before anything trains it: a folder's, or a fresh one with its vocabulary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_spec import models
from miles_spec.config import RunConfig
from miles_spec.draft.export import check_served
from miles_spec.draft.load import load
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import FAMILIES
from miles_spec.types import Sample


def vocabulary(samples: Sequence[Sample], size: int, model: Any) -> Tensor | None:
    """`most_frequent` of prompts and responses for a draft of `model`; None for its whole vocabulary."""
    tokens = ((*s.prompt.tokens, *s.completion.tokens) for s in samples)
    return most_frequent(tokens, size, model.config.vocab_size)


def most_frequent(texts: Iterable[Sequence[int]], size: int, total: int) -> Tensor | None:
    """`[Vd]` the `size` ids below `total` to draft over: the most frequent in `texts`, then the lowest; None for all.

    Byte-pair vocabularies number their tokens in the order they were merged, the most frequent in the tokenizer's
    training data first.
    """
    if not size or size >= total:
        return None
    counts = Counter(chain.from_iterable(texts))
    ranked = [token for token, _ in counts.most_common(size)]
    chosen = set(ranked)
    ranked += [token for token in range(total) if token not in chosen][: size - len(ranked)]
    return torch.tensor(sorted(ranked))


def first_draft(
    config: RunConfig, loaded: models.Loaded, samples: Sequence[Sample], saved: Mapping[str, Tensor] | None
) -> DraftHead:
    """`fresh_draft` over the vocabulary of the checkpoint's tensors `saved`, or without one over that of `samples`.

    Raises `ValueError` if `draft.vocab_size` is not that of the checkpoint.
    """
    size, total = config.draft.vocab_size, loaded.model.config.vocab_size
    if saved is None:
        return fresh_draft(config, loaded, vocabulary(samples, size, loaded.model))
    ids = saved.get("draft.vocab_ids")
    have, want = (total if ids is None else len(ids)), (size if 0 < size < total else total)
    if have != want:
        raise ValueError(f"the run's draft is over {have} tokens, and draft.vocab_size = {size} asks for {want}")
    return fresh_draft(config, loaded, ids)


def fresh_draft(config: RunConfig, loaded: models.Loaded, vocab_ids: Tensor | None) -> DraftHead:
    """The draft of a run without `draft.path`, over `vocab_ids` (None: all)."""
    generator = torch.Generator().manual_seed(config.seed)
    draft = config.draft
    return DraftHead.attach(loaded.model, FAMILIES[draft.fresh_family], vocab_ids, generator, draft.layers)


def given_draft(config: RunConfig, loaded: models.Loaded) -> DraftHead | None:
    """The draft in the folder `draft.path`; None for a run that has none, or makes its own.

    Raises `ValueError` for a draft that does not fit the model or the settings, and for a model that cannot have one.
    """
    if not config.draft.enabled:
        return None
    if not config.draft.path:
        models.check_draftable(loaded.model)
        return None
    draft = load(Path(config.draft.path).expanduser(), loaded.model, tokenizer=loaded.tokenizer)
    what = f"draft.path = {json.dumps(config.draft.path)}"
    if config.draft.family not in ("auto", draft.spec.family):
        raise ValueError(
            f'{what} holds a draft of family {draft.spec.family}, and draft.family is "{config.draft.family}"; set it '
            'to "auto"'
        )
    if config.rollout.engine == "sglang":
        check_served(loaded.model.config.model_type, draft.spec, draft.layers)
        if config.rollout.rule == "rejection" and draft.vocab_ids is not None:
            raise ValueError(
                f"{what} holds a draft over a reduced vocabulary, with which SGLang has no rejection sampling; set "
                'rollout.verify = "target"'
            )
    return draft
