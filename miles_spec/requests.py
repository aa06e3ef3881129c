"""What a run asks of the engine that makes its responses: how to sample, from which seed, over how long a context."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

from miles_spec.config import RunConfig
from miles_spec.types import Sampling


def sampling(config: RunConfig) -> Sampling:
    """How the run samples."""
    rollout = config.rollout
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_new_tokens=rollout.max_new_tokens,
        stop=rollout.stop,
    )


def seed_of(*parts: object) -> int:
    """63 bits that depend on all `parts` and nothing else."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def context_tokens(config: RunConfig) -> int:
    """Most tokens of a prompt and its response together."""
    return config.rollout.max_context or config.data.max_prompt_tokens + config.rollout.max_new_tokens


def check_context(max_context: int, model: Any) -> None:
    """Raises `ValueError` if the model was not made for sequences that long."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and max_context > most:
        raise ValueError(
            f"the context of {max_context} tokens (rollout.max_context, or data.max_prompt_tokens + "
            f"rollout.max_new_tokens) is longer than the model's {most}; lower them"
        )
