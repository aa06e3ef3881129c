"""The vocabulary: what flows between sampler, trainer, sync and report.

Imports nothing of ours and no torch at run time. Invariant: every value here is immutable; whoever changes one makes
a new one with `dataclasses.replace`.

Dimensions: `T` packed tokens, `S` segments of a pack, `n` response tokens of one sample, `k` draft depth in serving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from miles_spec.kernels.layout import PackedLayout

Role = Literal["target", "draft"]
VerifyRule = Literal["greedy", "target", "rejection"]
Finish = Literal["stop", "length", "abort"]


class RunError(RuntimeError):
    """A run cannot go on, for a reason that lies outside the program; the message is a sentence for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One task as the policy sees it."""

    id: str
    """Unique within the data source, stable over resumes."""
    tokens: tuple[int, ...]
    """Token ids, chat template applied."""
    text: str
    """What `tokens` decode to, for reports."""
    answer: Any = None
    """What the reward compares with; JSON-serialisable."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The source's own record, handed to the reward; JSON-serialisable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request is decoded."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    """Strings that end the response; they stay in it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the response, in addition to the model's end-of-sequence tokens."""
    ignore_eos: bool = False
    """Goes on past end-of-sequence tokens, to time a set number of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate."""

    id: str
    tokens: tuple[int, ...]
    """Token ids of the prompt, at least one."""
    sampling: Sampling
    seed: int = 0
    """The same seed gives the same response whatever shares the batch, up to floating-point ties."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Which weights made response tokens `start <= i < end`."""

    start: int
    end: int
    target: int
    draft: int | None
    """None where no draft took part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecCounts:
    """Counts of speculative decoding; they are pooled by adding, never averaged as ratios."""

    verify_steps: int = 0
    """Target forwards that verified at least one drafted token, summed over sequences."""
    drafted: tuple[int, ...] = ()
    """`[k]` drafted tokens that were verified, by position in the block."""
    accepted: tuple[int, ...] = ()
    """`[k]` drafted tokens that became part of the response, by position in the block."""

    def __add__(self, other: SpecCounts) -> SpecCounts:
        def add(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
            short, long = sorted((a, b), key=len)
            return tuple(x + (short[i] if i < len(short) else 0) for i, x in enumerate(long))

        return SpecCounts(
            verify_steps=self.verify_steps + other.verify_steps,
            drafted=add(self.drafted, other.drafted),
            accepted=add(self.accepted, other.accepted),
        )

    @property
    def accept_length(self) -> float:
        """Mean tokens per verify step, `1 + accepted / verify steps`; NaN without a verify step. It counts one too many
        for a block that ends its response on a drafted token."""
        return 1 + sum(self.accepted) / self.verify_steps if self.verify_steps else float("nan")

    @property
    def accept_rates(self) -> tuple[float, ...]:
        """`[k]` accepted over drafted by position; NaN where nothing was drafted."""
        return tuple(a / d if d else float("nan") for a, d in zip(self.accepted, self.drafted, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine returns for one request."""

    request_id: str
    tokens: tuple[int, ...]
    """`[n]` response token ids, the stop token included."""
    logprobs: tuple[float, ...]
    """`[n]` natural log-probability of each token under the target at the request's temperature (at 1 if that is 0),
    before top-p and top-k."""
    accepted: tuple[bool, ...]
    """`[n]` True where the token was proposed by the draft and accepted; empty where the engine does not tell."""
    versions: tuple[VersionSpan, ...]
    """Contiguous, covering `0..n`."""
    spec: SpecCounts
    finish: Finish
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One scored response."""

    prompt: Prompt
    index: int
    """Which of the prompt's samples this is."""
    completion: Completion
    reward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Several prompt + response sequences end to end, without padding: one micro-batch.

    `x[i]` belongs to `tokens[i]` in every field; whoever derives labels owns the shift.
    """

    layout: PackedLayout
    """Where each segment lies; made on the host."""
    tokens: Tensor
    """`[T]` int64."""
    loss_mask: Tensor
    """`[T]` bool, True where the policy sampled the token."""
    advantages: Tensor
    """`[T]` float32, 0 outside the mask."""
    rollout_logprobs: Tensor
    """`[T]` float32, the engine's log-probabilities, 0 outside the mask."""
    weights: Tensor
    """`[T]` float32; the policy loss is the plain sum of `weights * token loss` over all micro-batches of all ranks,
    so these carry the aggregation rule and its global denominator."""
    old_logprobs: Tensor | None = None
    """`[T]` float32, the trainer's own log-probabilities before the first of several minibatches; None when
    on-policy."""
    ref_logprobs: Tensor | None = None
    """`[T]` float32, the reference model's log-probabilities; None without a KL term."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMeta:
    """What an engine expects of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    """As in safetensors' and torch's names: `float32`, `bfloat16`, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """One role's new weights as they were sent; the tensors themselves travel in buckets."""

    version: int
    role: Role
    digests: Mapping[str, str]
    """Tensor name to the digest of the bytes the engine should serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What an engine says it serves after a push, compared with what was sent."""

    engine: str
    role: Role
    version: int
    tensors: int
    """How many tensors were compared."""
    mismatched: tuple[str, ...]
    """Names whose digest differs, or that are missing or unexpected, each with why."""
    attempts: int = 1
    """Pushes it took."""

    @property
    def verified(self) -> bool:
        return self.tensors > 0 and not self.mismatched


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecEstimate:
    """What an engine would have counted on given responses, had it drafted with given weights."""

    accepted: float
    """Expected drafted tokens that became part of the responses."""
    verify_steps: float
    """Expected verify steps."""

    def __add__(self, other: SpecEstimate) -> SpecEstimate:
        return SpecEstimate(
            accepted=self.accepted + other.accepted, verify_steps=self.verify_steps + other.verify_steps
        )

    @property
    def accept_length(self) -> float:
        """As `SpecCounts.accept_length`."""
        return 1 + self.accepted / self.verify_steps if self.verify_steps else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """Scalars of one optimizer step, already reduced over micro-batches and ranks."""

    policy: float
    entropy: float
    """Mean entropy of the policy over sampled tokens, nats, at the rollout temperature."""
    grad_norm: float
    """Of the policy, before clipping."""
    clip_fraction: float
    """Share of sampled tokens whose ratio was clipped."""
    rollout_kl: float
    """Mean over sampled tokens of `r - 1 - log r` with `log r` = train minus rollout log-probability (Schulman's
    k3)."""
    rollout_logprob_diff: float
    """Largest absolute difference between train and rollout log-probability."""
    tis_clip_fraction: float
    """Share of sampled tokens whose importance weight was above its cap, and so was truncated."""
    ref_kl: float
    """Mean k3 estimate of KL(policy, reference); 0 without a reference."""
    draft: float
    """The draft's loss, its rows weighted as trained; 0 without draft training."""
    draft_by_depth: tuple[float, ...] = ()
    """`[D]` mean draft loss per depth."""
    draft_grad_norm: float = 0.0
    draft_seconds: float = 0.0
    """Time spent on the draft's forward, backward and optimizer within the step."""
    acceptance: Mapping[str, SpecEstimate] = field(default_factory=dict)
    """Estimated acceptance on this step's rows: `cotrained` is the draft that served them, `frozen` the one of step
    1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimes:
    """Where an engine's time went since it was last asked, and what came of it."""

    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    """Target forwards of decoding, plain ones included."""
    other_s: float = 0.0
    """Sampling, acceptance and bookkeeping."""
    tokens: int = 0
    """Response tokens produced."""
    restarts: int = 0
    """Servers that died and came back."""
    requeued: int = 0
    """Requests made again because their server died or was late."""
    by_batch: Mapping[tuple[int, int], tuple[int, float]] = field(default_factory=dict)
    """For each number of sequences decoded together and depth drafted for them: steps, and their seconds. Empty of
    servers, which do not tell."""

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.draft_s + self.verify_s + self.other_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One line of `metrics.jsonl`."""

    step: int
    metrics: Mapping[str, Any]
    """Flat names to numbers or lists of numbers; `docs/metrics.md` explains each."""
    samples: tuple[Sample, ...] = ()
    """A few of the step's samples, for the report."""
