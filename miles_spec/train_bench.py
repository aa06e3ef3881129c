"""`miles-spec bench train`: tokens per second and model FLOP utilisation of training steps, with a draft and without.

A dense, Qwen3-shaped policy with random weights takes optimizer steps on packs of random tokens: alone, with a draft
that is trained by our code, and, beside Megatron's trainer, on Megatron's own path (`megatron_stock.py`), alone and
with its own MTP layer and loss. The draft is an MTP layer of the same kind (`qwen_mtp`), with the loss that a run has
by default; it learns from all of a step's micro-batches, or from a share of them, and drafts over the whole vocabulary
or a part of it. One process measures on one GPU, or on the CPU; torchrun starts more, which all call `train` alike.

Model FLOPs of a step: `6 * parameters of the layers` for each token, `6 * H * V` for each token whose prediction is
trained on (the LM head; the embedding is a look-up), and `12 * layers * width of the queries * mean context` for each
token's attention, the context being the tokens it sees, itself included. The draft and recomputation are not counted,
so all rows of one size have the same.

Invariant: rows of one size differ in what trains and by what, never in tokens, sizes or optimizer.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not in torch's `__all__`
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from miles_spec.config import DraftConfig, RunConfig, TrainConfig
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import QWEN_MTP
from miles_spec.kernels.attention import NAME
from miles_spec.kernels.layout import PackedLayout
from miles_spec.provenance import commit, write_result
from miles_spec.train.megatron_args import MegatronArguments
from miles_spec.train.memory import TrainingMemoryError
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.train_rows import STOCK, Case, Row, checks, table, trains
from miles_spec.types import LossTerms, PackedBatch, RunError

BACKENDS = ("torch", "megatron")
SEGMENT_TOKENS = (512, 4096)
"""Least and most tokens of a segment."""
PEAKS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12}
"""By a part of a GPU's name: its dense bfloat16 FLOP/s, from its data sheet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of the policy."""

    hidden: int = 2048
    layers: int = 28
    vocab: int = 151936

    def config(self) -> Qwen3Config:
        """As Qwen3-1.7B is built, which it is by default. Raises `ValueError` for a width without two heads, and for
        sizes that are none."""
        if min(self.hidden, self.layers) < 1 or self.vocab < 2:
            raise ValueError("a model has to have a width and a layer of at least 1, and a vocabulary of at least 2")
        head = 128 if self.hidden >= 1024 else 16
        if self.hidden % (2 * head):
            raise ValueError(f"a hidden size of {self.hidden} has no even number of heads of {head}; choose a multiple")
        return Qwen3Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // head,
            num_key_value_heads=self.hidden // head // 2,
            head_dim=head,
            max_position_embeddings=max(SEGMENT_TOKENS),
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured, and how. Raises `ValueError` for what cannot be."""

    backends: Sequence[str] = ("torch",)
    depths: Sequence[int] = (1,)
    shares: Sequence[float] = (1.0,)
    """`draft.share`, each for every depth."""
    draft_vocabs: Sequence[int] = ()
    """`draft.vocab_size`, each for every depth, beside the whole vocabulary."""
    tokens: Sequence[int] = (8192, 32768)
    size: Size = Size()
    micro_batches: int = 2
    """Of one data-parallel rank in a step."""
    turns: int = 5
    warm_ups: int = 2
    """Of each trainer; each turn and warm-up is a step."""
    rounds: int = 1
    """How often every case is measured, each time after all the others and by a fresh trainer: for hosts whose speed
    changes within minutes."""
    recompute: bool = False
    """`train.gradient_checkpointing`, which is torch's alone."""
    megatron: Mapping[str, Any] = field(default_factory=dict)
    """The table `[megatron]`."""
    budget_s: float = 540.0
    """What would begin later is left out, and named; steps end early too, the first excepted."""

    def __post_init__(self) -> None:
        for name in self.backends:
            if name not in BACKENDS:
                raise ValueError(f"there is no backend {name!r} to measure; there are {', '.join(BACKENDS)}")
        if "megatron" in self.backends and importlib.util.find_spec("megatron") is None:
            raise ValueError('the backend megatron needs megatron-core: pip install "miles-spec[megatron]"')
        if self.megatron and "megatron" not in self.backends:
            raise ValueError(f"{next(iter(self.megatron))} is an argument of Megatron; add megatron to --backends")
        if min((self.micro_batches, self.turns, self.rounds, *self.tokens, *self.depths)) < 1 or self.warm_ups < 0:
            raise ValueError("tokens, depths, micro-batches, turns and rounds have to be at least 1")
        for share in self.shares:
            if not 0 < share <= 1:
                raise ValueError(f"a draft cannot learn from a share of {share:g}; give one above 0, at most 1")
        for size in self.draft_vocabs:
            if not 0 < size < self.size.vocab:
                raise ValueError(f"a draft cannot be over {size} of {self.size.vocab} tokens; give fewer, at least 1")


def train(result: Path | None = None, plan: Plan | None = None) -> list[Row]:
    """Measures every case, prints it on rank 0, and writes it to `result`, which after each holds all that is done.
    Without a GPU the forwards are in float32, else in bfloat16.

    Raises `ValueError` for what cannot be measured, and `RunError` if one of several ranks is out of memory, since the
    others cannot go on then; alone, a process notes it in the row and goes on.
    """
    plan = plan or Plan()
    if "megatron" in plan.backends:
        given = int(os.environ.get("WORLD_SIZE", "1"))
        MegatronArguments.make(plan.megatron, dist.get_world_size() if dist.is_initialized() else given)
    with _ranks("megatron" in plan.backends) as device:
        bench = Bench(result, plan, device)
        for case in list(bench.cases()) * plan.rounds:
            bench.measure(case)
    return bench.rows


class Bench:
    """The rows of one call, the same on every rank."""

    def __init__(self, result: Path | None, plan: Plan, device: torch.device) -> None:
        self._measured: dict[Case, Row] = {}
        self.left_out: list[str] = []
        """What was not measured, and why."""
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.leads = self.world == 1 or dist.get_rank() == 0
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.hf_config = plan.size.config()
        self._result, self._plan = result, plan
        self._until = time.monotonic() + plan.budget_s
        self._commit = commit()  # before a tracked result is written, which makes the checkout differ
        self._console = Console(quiet=not self.leads)
        if not self._console.is_terminal:  # a log has no width of its own
            self._console = Console(width=150, quiet=not self.leads)

    @property
    def rows(self) -> list[Row]:
        """One for each case that was measured."""
        return list(self._measured.values())

    def cases(self) -> Iterator[Case]:
        """Size by size, so that what a budget cuts off is the largest."""
        plan, paths = self._plan, list(self._plan.backends)
        if "megatron" in paths:
            arguments = MegatronArguments.make(plan.megatron, self.world)
            arguments.check(self.hf_config)
            if arguments.pp * arguments.cp > 1:
                self._leave_out(f"{STOCK}: it is measured without pipeline and context parallelism alone")
            elif arguments.sequence_parallel and any(n % arguments.tp for n in plan.tokens):
                self._leave_out(f"{STOCK}: --tokens are not multiples of tensor_model_parallel_size")
            else:
                paths.append(STOCK)
        for n in plan.tokens:
            for path in paths:
                yield Case(backend=path, tokens=n, depth=0)
                for depth in plan.depths:
                    whole = Case(backend=path, tokens=n, depth=depth)
                    if path == STOCK:
                        yield whole
                        continue
                    yield from (replace(whole, share=share) for share in plan.shares)
                    yield from (replace(whole, draft_vocab=size) for size in plan.draft_vocabs)

    def measure(self, case: Case) -> None:
        """Adds the row of one case, or more turns to it, or names it as left out."""
        what = f"{case.backend}, {case.tokens} tokens, {trains(case)}"
        if self._late():
            self._leave_out(f"{what}: no time was left{' for another round' if case in self._measured else ''}")
            return
        data = self.world
        if case.backend != "torch":
            data = MegatronArguments.make(self._plan.megatron, self.world).dp
        batches = packs(self._plan.micro_batches * data, case.tokens, self._plan.size.vocab, self.device)
        layers, head = parameters(self.hf_config)
        row = Row(
            backend=case.backend,
            tokens=case.tokens,
            depth=case.depth,
            share=case.share,
            draft_vocab=case.draft_vocab,
            micro_batches=len(batches),
            parameters=layers + head,
            flops=step_flops(self.hf_config, batches),
        )
        if self.world > 1:  # what is written if another rank ends all
            self._write([replace(row, note="failed: the ranks ended in it")])
        full = False
        try:
            row = self._row(row, self._measured.get(case, row), *self._steps(case, batches))
        except (torch.OutOfMemoryError, TrainingMemoryError):
            full = True
        if full:  # not above, where the error still holds what it was raised in
            row = replace(row, note="out of memory")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._measured[case] = row
        self._console.print(table([row]))
        self._write()
        if full and self.world > 1:
            raise RunError(
                f"{what}: out of memory on one of {self.world} ranks, and the others cannot go on without it"
            )

    def _steps(
        self, case: Case, batches: Sequence[PackedBatch]
    ) -> tuple[tuple[float, ...], float | None, int | None, int | None]:
        """Seconds of each step, the norm of the first one's gradient, and the peaks of this rank's GPU and host
        memory."""
        host = _reset_host_peak()
        step = self._trainer(case)
        gc.collect()
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        taken: list[float] = []
        norm: float | None = None
        for turn in range(self._plan.warm_ups + self._plan.turns):
            if taken and self._late():
                break
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            terms = step(batches)
            if cuda:
                torch.cuda.synchronize()
            if turn >= self._plan.warm_ups:
                taken.append(time.perf_counter() - start)
            if turn == 0 and isinstance(terms, LossTerms):
                norm = terms.grad_norm
        return tuple(taken), norm, torch.cuda.max_memory_allocated() if cuda else None, _host_peak() if host else None

    def _trainer(self, case: Case) -> Callable[[Sequence[PackedBatch]], object]:
        """The step of a fresh trainer."""
        config = RunConfig(
            draft=DraftConfig(num_steps=max(1, case.depth), share=case.share),
            train=TrainConfig(
                backend="torch" if case.backend == "torch" else "megatron",
                gradient_checkpointing=self._plan.recompute and case.backend == "torch",
                token_budget=case.tokens,
            ),
            megatron=dict(self._plan.megatron),
        )
        if case.backend == STOCK:
            from miles_spec.megatron_stock import StockTrainer

            return StockTrainer(self.hf_config, config, self.world, self.device, self.dtype, case.depth).step
        model = self._model()
        draft = None
        if case.depth:
            ids = torch.arange(case.draft_vocab) if case.draft_vocab else None
            draft = DraftHead.attach(model, QWEN_MTP, ids, torch.Generator().manual_seed(1))
        if case.backend == "torch":
            group = dist.group.WORLD if self.world > 1 else None
            return TorchTrainer(model, draft, config, self.device, self.dtype, group=group).step
        from miles_spec.train.megatron import MegatronTrainer

        return MegatronTrainer(model, draft, config, self.device, self.dtype).step

    def _model(self) -> PreTrainedModel:
        """The same on every rank."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(self.hf_config, attn_implementation=NAME)
        return model.eval()

    def _row(
        self, row: Row, earlier: Row, turns: tuple[float, ...], norm: float | None, gpu: int | None, host: int | None
    ) -> Row:
        """With the turns of an earlier round; peaks and norm are of this one."""
        turns = earlier.turns + turns
        median = statistics.median(turns)
        rate = None
        if self.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name())
            rate = None if peak is None else row.flops / median / peak / self.world
        gpu, host = (None if n is None else int(self._most(n)) for n in (gpu, host))
        return replace(
            row,
            step_s=median,
            turns=turns,
            tokens_per_s=row.tokens * row.micro_batches / median,
            utilisation=rate,
            gpu_peak_bytes=gpu,
            host_peak_bytes=host,
            grad_norm=norm,
        )

    def _late(self) -> bool:
        """Whether rank 0 has no time left."""
        late = time.monotonic() > self._until
        return bool(self._most(float(late and self.leads)))

    def _most(self, number: float) -> float:
        """Of all ranks."""
        if self.world == 1:
            return number
        values = torch.tensor([number], dtype=torch.float64, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return float(values)

    def _leave_out(self, what: str) -> None:
        self.left_out.append(what)
        self._console.print(f"left out: {what}")
        self._write()

    def _write(self, more: Sequence[Row] = ()) -> None:
        if self._result is None or not self.leads:
            return
        write_result(
            self._result,
            "train",
            [asdict(row) for row in (*self.rows, *more)],
            checks(self.rows),
            commit=self._commit,
            settings={
                **asdict(self._plan.size),
                "ranks": self.world,
                "dtype": str(self.dtype).removeprefix("torch."),
                "draft": QWEN_MTP.family,
                "draft_loss": DraftConfig().loss,
                "turns": self._plan.turns,
                "warm_ups": self._plan.warm_ups,
                "rounds": self._plan.rounds,
                "gradient_checkpointing": self._plan.recompute,
                "megatron": self._plan.megatron,
                "segment_tokens": SEGMENT_TOKENS,
            },
            left_out=self.left_out,
        )


@contextmanager
def _ranks(megatron: bool) -> Iterator[torch.device]:
    """This rank's device, with the process group of those that torchrun has started, or, as Megatron needs it, of one.

    Raises `ValueError` on a host with too few GPUs.
    """
    cuda = torch.cuda.is_available()
    started = "RANK" in os.environ
    made = not dist.is_initialized() and (started or megatron)
    if made and started:
        local = int(os.environ["LOCAL_RANK"])
        if cuda and local >= torch.cuda.device_count():
            raise ValueError(f"rank {local} needs a GPU, and this host has {torch.cuda.device_count()}; start fewer")
        if cuda:
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    elif made:
        dist.init_process_group("nccl" if cuda else "gloo", store=HashStore(), rank=0, world_size=1)
    yield torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if made:  # not after an error, when other ranks may still wait in a collective
        if megatron:
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


# The work


def packs(count: int, tokens: int, vocab: int, device: torch.device) -> list[PackedBatch]:
    """`count` packs of `tokens` random tokens, the second half of each segment sampled; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    drawn = [segments(tokens, generator) for _ in range(count)]
    sampled = sum(length - length // 2 for lengths in drawn for length in lengths)
    out = []
    for lengths in drawn:
        mask = torch.cat([torch.arange(length) >= length // 2 for length in lengths])
        signs = torch.cat([torch.full((length,), 1.0 - 2 * (i % 2)) for i, length in enumerate(lengths)])
        out.append(
            PackedBatch(
                layout=PackedLayout.make(lengths, device),
                tokens=torch.randint(vocab, (tokens,), generator=generator).to(device),
                loss_mask=mask.to(device),
                advantages=(signs * mask).to(device),
                rollout_logprobs=(-math.log(vocab) * mask).to(device),
                weights=(mask / sampled).to(device),
            )
        )
    return out


def segments(tokens: int, generator: torch.Generator) -> list[int]:
    """Lengths within `SEGMENT_TOKENS` that come to `tokens`; of a smaller pack, from a quarter of it to all."""
    least, most = min(SEGMENT_TOKENS[0], max(1, tokens // 4)), min(SEGMENT_TOKENS[1], tokens)
    lengths = []
    while tokens:
        length = min(tokens, int(torch.randint(least, most + 1, (), generator=generator)))
        if 0 < tokens - length < least:  # too little would be left
            length = tokens if tokens <= most else tokens // 2
        lengths.append(length)
        tokens -= length
    return lengths


def parameters(config: Qwen3Config) -> tuple[int, int]:
    """Of all layers with the final norm, and of the LM head, which is the embedding too."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = config.vocab_size * config.hidden_size
    return sum(p.numel() for p in model.parameters()) - head, head


def step_flops(config: Qwen3Config, batches: Sequence[PackedBatch]) -> float:
    """As the module's docstring says."""
    layers, head = parameters(config)
    width = config.num_attention_heads * config.head_dim
    flops = 0.0
    for batch in batches:
        context = sum(n * (n + 1) / 2 for n in batch.layout.lengths)  # summed over tokens
        flops += 6 * layers * len(batch.tokens) + 6 * head * int(batch.loss_mask.sum())
        flops += 12 * config.num_hidden_layers * width * context
    return flops


def peak_flops(name: str) -> float | None:
    """Of a GPU of that name; None if it is not known."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def _reset_host_peak() -> bool:
    """Whether the system lets this process forget its peak."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _host_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
