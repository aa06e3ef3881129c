"""Puts the parts of a run together: policy, draft, trainer, engine, data, reward; fresh or from a checkpoint.

Invariant: when `assemble` returns, the engine serves, verified, the weights the trainer holds, and the draft's frozen
copy is the draft as it stood before step 1.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not in torch's `__all__`

from miles_spec import checkpoint, models, processes, rundir
from miles_spec.config import RunConfig
from miles_spec.data import DataBuffer, PromptSource, make_source
from miles_spec.draft.export import served_target, served_tensors
from miles_spec.draft.load import inspect
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import FAMILIES
from miles_spec.first_draft import first_draft, fresh_draft, given_draft
from miles_spec.live import LiveTable
from miles_spec.requests import check_context, context_tokens, sampling, seed_of
from miles_spec.rewards import Scorer
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.rollout.engine import Engine
from miles_spec.rollout.speculation import Controller, CostModel, calibrate, time_blocks
from miles_spec.run import NOT_PUSHED, Run
from miles_spec.serving import Serving, Weights
from miles_spec.sync.collective import without_cumem
from miles_spec.sync.session import Syncer
from miles_spec.sync.transports import InProcess
from miles_spec.train import ranks as followers
from miles_spec.train.base import Trainer
from miles_spec.train.megatron_args import MegatronArguments
from miles_spec.train.packing import pack
from miles_spec.train.ranks import Leader, Ranks
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.types import Completion, LossTerms, Prompt, Request, Role, Sample

if TYPE_CHECKING:
    from miles_spec.train.megatron import MegatronTrainer

    LocalTrainer = TorchTrainer | MegatronTrainer

log = logging.getLogger(__name__)

WARMUP_BATCH_TOKENS = 1024
"""Most tokens of one draft step of the warm start."""


def join(config: RunConfig) -> Ranks | None:
    """The ranks of a run of several processes, of which this is one; None for a run of one.

    Raises `ValueError` if the run cannot have so many, if they were not started, or if `[megatron]` does not fit them
    or the model.
    """
    if config.train.backend == "megatron":
        _check_megatron(config)
    if config.rollout.engine == "sglang":
        without_cumem()
    if processes.count(config) == 1:
        return None
    if "RANK" not in os.environ:
        raise ValueError(f"train.ranks is {config.train.ranks}, and this is one process; start `miles-spec train`")
    return Ranks.join(config.model.device)


def _check_megatron(config: RunConfig) -> None:
    if importlib.util.find_spec("megatron") is None:
        raise ValueError('train.backend = "megatron" needs megatron-core: pip install "miles-spec[megatron]"')
    arguments = MegatronArguments.make(config.megatron, processes.count(config))
    arguments.check(models.configuration(config.model))
    draft = config.draft
    if draft.enabled and arguments.pp > 1:
        family = inspect(Path(draft.path).expanduser()).family if draft.path else draft.fresh_family
        if FAMILIES[family].reads == "aux":
            raise ValueError(
                f"a draft of family {family} reads states between the layers, so it needs them all in one pipeline "
                "stage; set pipeline_model_parallel_size = 1"
            )


def in_one_process(config: RunConfig) -> RunConfig:
    """The same run in this process alone, on its checkpoints, which any trainer reads."""
    return replace(config, megatron={}, train=replace(config.train, backend="torch", ranks=1))


def make_trainer(
    config: RunConfig, loaded: models.Loaded, draft: DraftHead | None, ranks: Ranks | None
) -> LocalTrainer:
    """This rank's trainer; all ranks make theirs at the same time. `ranks` is None in a run of one process."""
    if config.train.backend == "megatron":
        from miles_spec.train.megatron import MegatronTrainer

        if not dist.is_initialized():
            kind = "nccl" if loaded.device.type == "cuda" else "gloo"
            dist.init_process_group(kind, store=HashStore(), rank=0, world_size=1)
        # nothing but the embedded engine goes on with the model as it is
        spare = config.rollout.engine == "sglang" or (ranks is not None and ranks.rank > 0)
        return MegatronTrainer(loaded.model, draft, config, loaded.device, loaded.dtype, consume=spare)
    if ranks is None:
        return TorchTrainer(loaded.model, draft, config, loaded.device, loaded.dtype)
    # the embedded engine goes on with the model as it is, whole
    shared = config.rollout.engine == "embedded" and not ranks.rank
    model = copy.deepcopy(loaded.model) if shared else loaded.model
    return TorchTrainer(model, draft, config, loaded.device, loaded.dtype, group=dist.group.WORLD)


def start_trainer(config: RunConfig, loaded: models.Loaded, draft: DraftHead | None, ranks: Ranks | None) -> Trainer:
    """The run's trainer: this process's own, or one that all ranks work in, with this draft."""
    if ranks is None:
        return make_trainer(config, loaded, draft, None)
    ids, tensors = (None, None) if draft is None else (draft.vocab_ids, draft.state_dict())
    return Leader(lambda: make_trainer(config, loaded, draft, ranks), ranks, ids, tensors)


def follow(config: RunConfig, ranks: Ranks) -> None:
    """All that a rank other than 0 does: it loads the model, makes its trainer when rank 0 does, and follows."""
    torch.manual_seed(config.seed)
    failed: Exception | None = None
    try:
        processes.log_to(Path(config.out) / "logs" / f"rank{ranks.rank}.log")
        loaded = models.load(config.model)
    except Exception as error:  # rank 0 raises it as soon as it asks for a trainer
        failed = error

    def build(ids: Tensor | None, tensors: dict[str, Tensor] | None) -> LocalTrainer:
        if failed is not None:
            raise failed
        draft = None
        if tensors is not None:
            draft = given_draft(config, loaded) or fresh_draft(config, loaded, ids)
            draft.load_state_dict(tensors)
        return make_trainer(config, loaded, draft, ranks)

    followers.follow(build, ranks)


def assemble(
    config: RunConfig,
    live: LiveTable,
    ranks: Ranks | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Run:
    """All parts of the run that `config` describes, resumed from its newest checkpoint if there is one.

    With `ranks`, of which this is rank 0, all of them train; everything else is in this process.
    Raises `ValueError` in one sentence for whatever cannot work, the cheap checks first, and `KeyboardInterrupt` if
    `interrupted` says so during the draft's warm start, of which nothing is kept.
    """
    out = Path(config.out)
    rundir.check_out(out)
    torch.manual_seed(config.seed)  # whatever else is random, such as a user's reward; resuming brings its state back
    scorer = Scorer(config.reward)
    live.phase("loading the model")
    loaded = models.load(config.model)
    source = make_source(config.data, loaded.tokenizer, config.seed)
    if isinstance(source, DataBuffer):  # what the user's own source gives is seen when it comes
        scorer.check(source.prompts)
    saved = checkpoint.load_latest(out) if config.checkpoint.resume else None
    if not config.checkpoint.resume and checkpoint.steps(out):
        raise ValueError(f"{out} holds checkpoints of an earlier run; set checkpoint.resume, or choose another `out`")
    if saved is not None:
        if "source" not in saved.values:
            raise ValueError(f"{out} holds checkpoints of `miles-spec draft train`; choose another `out`")
        source.load_state(saved.values["source"])
    max_context = context_tokens(config)
    check_context(max_context, loaded.model)
    draft = given_draft(config, loaded)
    with ExitStack() as stack:
        run = _assemble(config, live, ranks, out, loaded, source, scorer, draft, saved, max_context, stack, interrupted)
        stack.pop_all()
    return run


def _assemble(
    config: RunConfig,
    live: LiveTable,
    ranks: Ranks | None,
    out: Path,
    loaded: models.Loaded,
    source: PromptSource,
    scorer: Scorer,
    draft: DraftHead | None,
    saved: checkpoint.Checkpoint | None,
    max_context: int,
    stack: ExitStack,
    interrupted: Callable[[], bool],
) -> Run:
    """What starts servers and trains; `stack` ends the servers if it does not come to its end."""
    rollout, draft_config = config.rollout, config.draft
    engine: Engine
    serving: Serving | None = None
    if rollout.engine == "sglang":
        live.phase("starting servers")
        serving = Serving(config, loaded, out / "serve", max_context, lambda: untrained(loaded))
        stack.callback(serving.stop)
        serving.start()
        engine, syncer = serving.fleet, serving.syncer
        untrained(loaded).push(syncer, engine.members(), self_test=True)
    else:
        engine, syncer = embedded(config, loaded, max_context), Syncer(InProcess())
    cost = None
    plain: list[Sample] = []
    # taken in a run without a draft too: the policy sees the same prompts either way
    count = draft_config.warmup_prompts
    if saved is not None:
        count = min(count, 2 * rollout.max_running)
    prompts = source.take(count)
    if saved is not None:
        source.load_state(saved.values["source"])
    if draft_config.enabled:
        # rollouts without speculation: they check the cost model, and a fresh draft learns from them
        live.phase("rollouts without speculation")
        plain, cost = _plain_rollouts(engine, prompts, config, live)
        if draft is None:
            draft = first_draft(config, loaded, plain, None if saved is None else saved.tensors)
    # a trainer may cut its model up
    head = models.head_weight(loaded.model)
    head_name = next(name for name, parameter in loaded.model.named_parameters() if parameter is head)
    target = served_target(loaded.model) if serving is not None else models.stored_tensors(loaded.model).items()
    shapes: dict[Role, dict[str, tuple[int, ...]]] = {"target": {name: tuple(t.shape) for name, t in target}}
    drafted: dict[str, Tensor] = {}
    if draft is not None:
        drafted = draft.exported() if serving is None else dict(served_tensors(draft, head))
        shapes["draft"] = {name: tuple(t.shape) for name, t in drafted.items()}
    if config.train.offload:
        engine.release()
    trainer = start_trainer(config, loaded, draft, ranks)
    losses: list[float] = []
    accept_length: float | None = None
    if saved is not None:
        trainer.load_state(saved.tensors, saved.values["trainer"])
    elif draft is not None:
        for terms in _warm_start(trainer, plain, config, loaded.device, fit=draft.fresh):
            losses.append(terms.draft)
            if "cotrained" in terms.acceptance:
                accept_length = terms.acceptance["cotrained"].accept_length
            live.phase("warm start of the draft", len(losses), draft_config.warmup_steps)
            if interrupted():
                raise KeyboardInterrupt
        trainer.freeze_draft()
    trainer.trim()
    if config.train.offload:
        trainer.sleep(NOT_PUSHED)
        engine.wake()
    if draft is not None and serving is not None:
        serving.attach_draft(draft, drafted, draft_config.num_steps)
    elif draft is not None:
        assert isinstance(engine, EmbeddedEngine)
        engine.attach_draft(draft)
        engine.set_draft_depth(draft_config.num_steps)
    controller = None
    if draft is not None and draft_config.adaptive:
        assert cost is not None
        deepest = draft_config.num_steps
        # layers for other depths would lack what shallower blocks leave out
        depths = range(1, deepest + 1) if draft.layers == 1 else (deepest,)
        controller = Controller(cost, depths, rollout.max_running, accept_length)
    run = Run(
        config=config,
        out=out,
        tokenizer=loaded.tokenizer,
        source=source,
        scorer=scorer,
        trainer=trainer,
        draft=draft,
        engine=engine,
        serving=serving,
        model_type=loaded.model.config.model_type,
        head_name=head_name,
        shapes=shapes,
        syncer=syncer,
        cost=cost,
        controller=controller,
        step=0 if saved is None else saved.step,
        halved_budget=None if saved is None else saved.values.get("halved_budget"),
        time_s=0.0 if saved is None else saved.values["time_s"],
        warmup_losses=tuple(losses),
    )
    if serving is not None:
        serving.weights = run.weights
    run.push(self_test=True)
    if controller is not None:
        assert isinstance(engine, EmbeddedEngine)
        live.phase("timing blocks")
        time_blocks(engine, controller, max((p.tokens for p in prompts), key=len))
    log.info("the engine serves version %d, verified", trainer.version)
    return run


def embedded(config: RunConfig, loaded: models.Loaded, max_context: int) -> EmbeddedEngine:
    """The engine in this process, without a draft yet."""
    return EmbeddedEngine(
        loaded.model,
        None,
        tokenizer=loaded.tokenizer,
        eos_ids=loaded.eos_ids,
        dtype=loaded.dtype,
        rule=config.rollout.rule,
        max_batch=config.draft.max_batch,
        max_running=config.rollout.max_running,
        max_context=max_context,
        prefill_chunk_tokens=config.rollout.prefill_chunk_tokens,
    )


def untrained(loaded: models.Loaded) -> Weights:
    """What servers serve before there is a trainer."""
    return Weights(version=0, target=dict(served_target(loaded.model)))


def _plain_rollouts(
    engine: Engine, prompts: Sequence[Prompt], config: RunConfig, live: LiveTable
) -> tuple[list[Sample], CostModel | None]:
    """One response to each prompt, and the cost model of the engine, fitted to the first half of them and its error
    measured on the second; None for servers that cannot be asked to go without their draft."""
    cost = None
    if not config.rollout.urls:  # joined servers draft already: what they cost without is not known
        served = config.rollout.engine == "sglang"
        cost = calibrate(engine, max((p.tokens for p in prompts), key=len), served=served)
    requests = [
        Request(id=str(i), tokens=p.tokens, sampling=sampling(config), seed=seed_of(config.seed, "plain", i))
        for i, p in enumerate(prompts)
    ]
    done = iter(range(1, len(requests) + 1))
    live.phase("rollouts without speculation", 0, len(requests))
    half = len(requests) // 2
    out: list[Completion] = []
    for part in filter(None, (requests[:half], requests[half:])):
        engine.take_times()
        made = engine.generate(part, lambda _: live.phase("rollouts without speculation", next(done), len(requests)))
        out += made
        if cost is not None:
            times = engine.take_times()
            seconds, lengths = times.verify_s + times.other_s, [len(c.tokens) for c in made]
            rows = min(engine.max_running * len(engine.members()), len(made))
            last = len(out) == len(requests)
            cost = cost.checked(seconds, lengths, rows) if last else cost.fitted(seconds, lengths, rows)
    return [Sample(prompt=p, index=0, completion=c, reward=0.0) for p, c in zip(prompts, out, strict=True)], cost


def _warm_start(
    trainer: Trainer, samples: Sequence[Sample], config: RunConfig, device: torch.device, *, fit: bool
) -> Iterator[LossTerms]:
    """Draft-only steps on the policy's own rollouts, with `fit` from the closed form of a fresh draft on."""
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
    if fit:
        trainer.fit_draft(batches)
    return trainer.warm_draft(batches, config.draft.warmup_steps)
