"""Puts the parts of a run together: policy, draft, trainer, engine, data, reward; fresh or from a checkpoint.

Invariant: when `assemble` returns, the engine serves, verified, the weights the trainer holds, and the draft's frozen
copy is the draft as it stood before step 1.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_spec import checkpoint, models
from miles_spec.config import RunConfig
from miles_spec.data import PromptSource, make_source
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import FAMILIES
from miles_spec.live import LiveTable
from miles_spec.rewards import Scorer
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.rollout.speculation import CostModel, calibrate
from miles_spec.sync.session import Syncer
from miles_spec.sync.transports import InProcess
from miles_spec.train.packing import pack
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.types import LossTerms, Receipt, Request, Sample, Sampling

log = logging.getLogger(__name__)

WARMUP_BATCH_TOKENS = 1024
"""Most tokens of one draft step of the warm start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All parts of a run."""

    config: RunConfig
    out: Path
    tokenizer: Any
    source: PromptSource
    scorer: Scorer
    trainer: TorchTrainer
    engine: EmbeddedEngine
    syncer: Syncer
    cost: CostModel
    step: int
    """Steps done before, by the run that is resumed."""
    warmup_losses: tuple[float, ...]
    """The draft's loss at each step of its warm start; empty when resumed."""

    def save(self, step: int, cursor: dict[str, Any]) -> Path:
        """Writes the checkpoint of `step`, after which the data goes on at `cursor`."""
        tensors, values = self.trainer.state()
        values = {"trainer": values, "source": cursor}
        return checkpoint.save(self.out, step, tensors, values, keep=self.config.checkpoint.keep)

    def pieces(self, sample: Sample) -> list[str]:
        """The text of each response token."""
        return [self.tokenizer.decode([token]) for token in sample.completion.tokens]

    def push(self) -> list[Receipt]:
        """Sends the trainer's weights to the engine; the receipts."""
        draft = self.trainer.weights("draft") if self.trainer.draft is not None else None
        return self.syncer.push(
            self.engine,
            version=self.trainer.version,
            target=self.trainer.weights("target"),
            draft_version=self.trainer.draft_version if draft is not None else None,
            draft=draft,
        )


def assemble(config: RunConfig, live: LiveTable) -> Run:
    """All parts of the run that `config` describes, resumed from its newest checkpoint if there is one.

    Raises `ValueError` in one sentence for whatever cannot work, the cheap checks first.
    """
    out = Path(config.out)
    scorer = Scorer(config.reward)
    live.phase("loading the model")
    loaded = models.load(config.model)
    source = make_source(config.data, loaded.tokenizer, config.seed)
    saved = checkpoint.load_latest(out) if config.checkpoint.resume else None
    if not config.checkpoint.resume and checkpoint.steps(out):
        raise ValueError(f"{out} holds checkpoints of an earlier run; set checkpoint.resume, or choose another `out`")
    if saved is not None:
        source.load_state(saved.values["source"])
    rollout, draft_config = config.rollout, config.draft
    engine = EmbeddedEngine(
        loaded.model,
        None,
        tokenizer=loaded.tokenizer,
        eos_ids=loaded.eos_ids,
        dtype=loaded.dtype,
        rule=rollout.rule,
        max_batch=draft_config.max_batch,
        max_running=rollout.max_running,
        max_context=rollout.max_context or config.data.max_prompt_tokens + rollout.max_new_tokens,
        prefill_chunk_tokens=rollout.prefill_chunk_tokens,
    )
    # rollouts without speculation: they check the cost model, and a fresh draft learns from them
    live.phase("rollouts without speculation")
    plain, cost = _plain_rollouts(engine, source, config, live)
    draft = None
    if draft_config.enabled:
        saved_ids = None if saved is None else saved.tensors.get("draft.vocab_ids")
        vocab_ids = saved_ids if saved is not None else _vocabulary(plain, draft_config.vocab_size, loaded.model)
        generator = torch.Generator().manual_seed(config.seed)
        draft = DraftHead.attach(loaded.model, FAMILIES[draft_config.family], vocab_ids, generator)
    trainer = TorchTrainer(loaded.model, draft, config, loaded.device, loaded.dtype)
    losses: list[float] = []
    if saved is not None:
        trainer.load_state(saved.tensors, saved.values["trainer"])
    elif draft is not None:
        for terms in _warm_start(trainer, plain, config, loaded.device):
            losses.append(terms.draft)
            live.phase("warm start of the draft", len(losses), draft_config.warmup_steps)
        trainer.freeze_draft()
    if draft is not None:
        engine.attach_draft(draft)
        engine.set_draft_depth(draft_config.num_steps)
    run = Run(
        config=config,
        out=out,
        tokenizer=loaded.tokenizer,
        source=source,
        scorer=scorer,
        trainer=trainer,
        engine=engine,
        syncer=Syncer(InProcess()),
        cost=cost,
        step=0 if saved is None else saved.step,
        warmup_losses=tuple(losses),
    )
    run.push()
    return run


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


def _plain_rollouts(
    engine: EmbeddedEngine, source: PromptSource, config: RunConfig, live: LiveTable
) -> tuple[list[Sample], CostModel]:
    """One response to each of the first `draft.warmup_prompts` prompts, without moving the source on, and the cost
    model of the engine, its error measured on them."""
    cursor = source.state()
    prompts = source.take(config.draft.warmup_prompts)
    source.load_state(cursor)
    cost = calibrate(engine, max((p.tokens for p in prompts), key=len))
    requests = [
        Request(id=str(i), tokens=p.tokens, sampling=sampling(config), seed=seed_of(config.seed, "plain", i))
        for i, p in enumerate(prompts)
    ]
    done = iter(range(1, len(requests) + 1))
    live.phase("rollouts without speculation", 0, len(requests))
    engine.take_times()
    out = engine.generate(requests, lambda _: live.phase("rollouts without speculation", next(done), len(requests)))
    times = engine.take_times()
    rows = min(engine.max_running, len(out))
    cost = cost.checked(times.verify_s + times.other_s, [len(c.tokens) for c in out], rows)
    return [Sample(prompt=p, index=0, completion=c, reward=0.0) for p, c in zip(prompts, out, strict=True)], cost


def _vocabulary(samples: Sequence[Sample], size: int, model: Any) -> Tensor | None:
    """`[Vd]` the `size` token ids to draft over: the most frequent in prompts and responses, then the lowest.

    Byte-pair vocabularies number their tokens in the order they were merged, the most frequent in the tokenizer's
    training data first.
    """
    total = model.config.vocab_size
    if not size or size >= total:
        return None
    counts = Counter(chain.from_iterable((*s.prompt.tokens, *s.completion.tokens) for s in samples))
    ranked = [token for token, _ in counts.most_common(size)]
    chosen = set(ranked)
    ranked += [token for token in range(total) if token not in chosen][: size - len(ranked)]
    return torch.tensor(sorted(ranked))


def _warm_start(
    trainer: TorchTrainer, samples: Sequence[Sample], config: RunConfig, device: torch.device
) -> Iterator[LossTerms]:
    """Draft-only steps on the policy's own rollouts."""
    budget = min(config.train.token_budget, WARMUP_BATCH_TOKENS)
    (batches,) = pack(
        samples,
        [0.0] * len(samples),
        token_budget=budget,
        aggregation="token",
        max_new_tokens=config.rollout.max_new_tokens,
        minibatches=1,
        device=device,
    )
    return trainer.warm_draft(batches, config.draft.warmup_steps)
