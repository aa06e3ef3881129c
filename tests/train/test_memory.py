"""A trainer that sleeps, and one that runs out of memory: on a CPU with faults that are put in; what a GPU frees is
measured on one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import megatron_cpu
from conftest import state_of, tiny_config, tiny_model
from distributed import Ranks
from miles_spec.config import RunConfig, TrainConfig
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE
from miles_spec.kernels.attention import NAME
from miles_spec.train import fsdp, memory
from miles_spec.train.memory import GRADIENTS, Memory, TokenBudget, TrainingMemoryError
from miles_spec.train.packing import pack, repack
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.types import PackedBatch
from oracles.samples import random_samples

from .test_torch_trainer import assert_near, assert_same, batches, config, trainer

TAGS = ("weights", "optimizer", "draft")


def run_of(offload: tuple[str, ...] = TAGS, **train: Any) -> RunConfig:
    return config(kl_coef=0.1, offload=offload, lr=1e-3, **train)


def packs(budget: int = 16) -> list[PackedBatch]:
    return [replace(batch, ref_logprobs=batch.rollout_logprobs) for batch in batches(budget=budget)]


def storages(subject: Any) -> dict[str, list[torch.UntypedStorage]]:
    local = {tag: [memory._local(t) for t in tensors] for tag, tensors in subject._held().items()}
    return {tag: [t.untyped_storage() for t in tensors] for tag, tensors in local.items()}


def sizes(of: Mapping[str, list[torch.UntypedStorage]]) -> dict[str, set[bool]]:
    return {tag: {storage.size() > 0 for storage in found} for tag, found in of.items()}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors lie across them."""
    monkeypatch.setattr(memory, "CHUNK_BYTES", 1000)


@pytest.mark.parametrize("offload", [TAGS, ("optimizer",), ("draft", "weights")], ids="-".join)
def test_what_slept_is_the_same_bit_for_bit(offload: tuple[str, ...]) -> None:
    subject, other = (trainer(run_of(tags)) for tags in (offload, ()))
    for each in (subject, other):
        each.step(packs())
        each.freeze_draft()
    for _ in range(2):  # the second time the host has its memory already
        before = {name: tensor.clone() for name, tensor in subject._owned().items()}
        held = storages(subject)
        assert all(here == {True} for here in sizes(held).values())
        subject.sleep(TAGS)
        assert sizes(held) == {tag: {tag not in (*offload, GRADIENTS)} for tag in held}
        assert subject.asleep
        subject.wake()
        assert not subject.asleep
        assert_same(subject._owned(), before)
        assert all(here == {True} for here in sizes(held).values())
        for tensor in subject._held()[GRADIENTS]:
            assert not tensor.any()
        assert repr(replace(subject.step(packs()), draft_seconds=0.0)) == repr(
            replace(other.step(packs()), draft_seconds=0.0)
        )
        assert_same(subject._owned(), other._owned())
    got, expected = (each.logprobs(packs(), reference=True) for each in (subject, other))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_trimming_forgets_gradients_and_nothing_else() -> None:
    trimmed, other = (trainer(run_of()) for _ in range(2))
    for subject in (trimmed, other):
        subject.step(packs())
    held = {tag for tag, found in storages(trimmed).items() if found}
    assert held == {*TAGS, GRADIENTS}
    before = {name: tensor.clone() for name, tensor in state_of(trimmed)[0].items()}
    trimmed.trim()
    assert not storages(trimmed)[GRADIENTS]
    assert_same(state_of(trimmed)[0], before)
    for subject in (trimmed, other):
        subject.step(packs())
    assert_same(state_of(trimmed)[0], state_of(other)[0])


def test_a_part_sleeps_and_wakes() -> None:
    subject = trainer(run_of(("weights", "optimizer")))
    subject.step(packs())
    served = {name: tensor.clone() for name, tensor in subject.weights("target")}
    held = storages(subject)
    subject.sleep(("optimizer",))
    assert sizes(held) == {"weights": {True}, GRADIENTS: {False}, "optimizer": {False}, "draft": {True}}
    assert_same(dict(subject.weights("target")), served)
    subject.sleep(TAGS)
    assert sizes(held)["weights"] == {False} and dict(subject.weights("draft"))
    subject.wake(("weights", "draft"))
    assert sizes(held) == {"weights": {True}, GRADIENTS: {False}, "optimizer": {False}, "draft": {True}}
    assert_same(dict(subject.weights("target")), served)
    assert subject.asleep
    with pytest.raises(AssertionError, match=r"the trainer sleeps \(gradients, optimizer\): wake it first"):
        subject.step(packs())


USES: dict[str, Callable[[TorchTrainer], Any]] = {
    "step": lambda t: t.step(packs()),
    "logprobs": lambda t: t.logprobs(packs()),
    "warm_draft": lambda t: list(t.warm_draft(packs(), 1)),
    "train_draft": lambda t: t.train_draft(packs()),
    "estimate_draft": lambda t: t.estimate_draft(packs()),
    "freeze_draft": lambda t: t.freeze_draft(),
    "target": lambda t: list(t.weights("target")),
    "draft": lambda t: list(t.weights("draft")),
    "state": lambda t: state_of(t),
    "load_state": lambda t: t.load_state({}, {}),
}


@pytest.mark.parametrize("use", USES)
def test_a_trainer_that_sleeps_is_not_used(use: str) -> None:
    subject = trainer(run_of())
    subject.sleep(TAGS)
    with pytest.raises(AssertionError, match="the trainer sleeps"):
        USES[use](subject)


def test_memory_that_is_a_part_of_a_file_can_sleep() -> None:
    """As weights that safetensors read are, on a CPU: such storages cannot be emptied."""
    model = tiny_model("llama")
    for p in model.parameters():
        whole = torch.frombuffer(bytearray(p.detach().numpy().tobytes()), dtype=torch.float32)
        p.data = whole.view(p.shape)
        assert not p.untyped_storage().resizable()
    subject = TorchTrainer(model, None, run_of(), "cpu")
    before = {name: tensor.clone() for name, tensor in subject._owned().items()}
    subject.sleep(TAGS)
    assert sizes(storages(subject))["weights"] == {False}
    subject.wake()
    assert_same(subject._owned(), before)


def _sleeps(subject: Any, other: Any, state: Callable[[Any], Mapping[str, Tensor]]) -> bool:
    """On several ranks: as in `test_what_slept_is_the_same_bit_for_bit`."""
    for each in (subject, other):
        each.step(packs())
        each.freeze_draft()
    before = {name: tensor.clone() for name, tensor in state(subject).items()}
    held = storages(subject)
    subject.sleep(TAGS)
    assert all(here in (set(), {False}) for here in sizes(held).values()), sizes(held)
    subject.wake()
    assert_same(dict(state(subject)), before)
    subject.step(packs())
    other.step(packs())
    assert_same(dict(state(subject)), dict(state(other)))
    return bool(held["weights"] and held["optimizer"])


def _shards(subject: TorchTrainer) -> dict[str, Tensor]:
    return {name: fsdp.full(tensor) for name, tensor in subject._owned().items()}


def _fsdp(group: dist.ProcessGroup) -> bool:
    made = []
    for offload in (TAGS, ()):
        model = tiny_model("llama")
        draft = DraftHead.attach(model, EAGLE, None, torch.Generator().manual_seed(1))
        made.append(TorchTrainer(model, draft, run_of(offload), "cpu", group=group))
    return _sleeps(made[0], made[1], _shards)


def test_shards_sleep(ranks: Ranks) -> None:
    assert ranks.run(_fsdp, 2) == [True, True]


def _megatron(arguments: Any, table: dict[str, Any], dtype: torch.dtype) -> bool:
    from miles_spec.train.megatron import MegatronTrainer

    from .test_megatron import _draft, _model

    made = []
    for offload in (TAGS, ()):
        model = _model("llama")
        made.append(MegatronTrainer(model, _draft(model), replace(run_of(offload), megatron=table), "cpu", dtype))
    shards = [t for t in made[0].optimizer.tensors() if t.untyped_storage()._cdata in _cdata(made[0].policy)]
    assert bool(shards) == (dtype == torch.float32)  # else the optimizer's float32 weights are its own
    return _sleeps(made[0], made[1], _own)


def _own(subject: Any) -> dict[str, Tensor]:
    held = {tag: tensors for tag, tensors in subject._held().items() if tag != GRADIENTS}
    return {f"{tag}.{i}": t.detach() for tag, tensors in held.items() for i, t in enumerate(tensors)}


def _cdata(module: torch.nn.Module) -> set[int]:
    return {p.untyped_storage()._cdata for p in module.parameters()}


@megatron_cpu.installed
@pytest.mark.parametrize(
    ("table", "size", "dtype"),
    [
        ({}, 1, torch.float32),
        ({}, 2, torch.bfloat16),
        ({"tensor_model_parallel_size": 2}, 2, torch.float32),
        ({"pipeline_model_parallel_size": 2}, 2, torch.float32),
    ],
    ids=["one", "dp-bfloat16", "tensor", "pipeline"],
)
def test_megatron_sleeps(table: dict[str, Any], size: int, dtype: torch.dtype) -> None:
    assert megatron_cpu.run(_megatron, table, size, table, dtype) == [True] * size


@contextmanager
def out_of_memory(owner: Any, name: str, at: int) -> Iterator[None]:
    """Has the `at`-th call of a method fail as torch does, after its work."""
    real, calls = getattr(owner, name), 0

    def failing(*args: Any, **options: Any) -> Any:
        nonlocal calls
        result, calls = real(*args, **options), calls + 1
        if calls == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return result

    setattr(owner, name, failing)
    try:
        yield
    finally:
        setattr(owner, name, real)


def test_it_says_where_and_what_to_do() -> None:
    subject = trainer(run_of((), token_budget=77))
    with out_of_memory(subject, "_forward", 2), pytest.raises(TrainingMemoryError) as error:
        subject.step(packs())
    assert str(error.value) == (
        "out of memory in the policy's forward, with a micro-batch of 15 tokens: the trainer holds 0.00 GiB weights, "
        "0.00 GiB optimizer, 0.00 GiB draft, 0.00 GiB gradients; lower train.token_budget (77), or set "
        "train.gradient_checkpointing, or train on more ranks (train.ranks, now 1)"
    )
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    served = replace(run_of(), rollout=replace(run_of().rollout, engine="sglang"))
    subject = trainer(replace(served, train=replace(served.train, gradient_checkpointing=True)))
    assert subject.optimizer is not None
    with out_of_memory(subject.optimizer, "step", 1), pytest.raises(TrainingMemoryError) as error:
        subject.step(packs())
    assert "token_budget" not in str(error.value) and "(fleet.margin_gb, now 8)" in str(error.value)


@pytest.mark.parametrize(
    ("given", "table", "advised"),
    [
        ({}, {}, "set train.gradient_checkpointing"),
        ({"gradient_checkpointing": True}, {}, None),
        ({"backend": "megatron"}, {}, "set recompute_granularity in [megatron]"),
        ({"backend": "megatron"}, {"recompute-granularity": "full"}, None),
    ],
)
def test_what_is_set_already_is_not_advised(given: dict[str, Any], table: dict[str, Any], advised: str | None) -> None:
    subject = Memory(replace(run_of((), **given), megatron=table), torch.device("cpu"), lambda: {})
    with pytest.raises(TrainingMemoryError) as error, subject.told():
        subject.at("here", 8)
        raise torch.OutOfMemoryError
    between = "" if advised is None else f", or {advised}"
    budget = f"lower train.token_budget ({TrainConfig().token_budget})"
    assert f"{budget}{between}, or train on more ranks" in str(error.value)


def test_running_out_in_a_warm_start_is_told_too() -> None:
    subject = trainer(run_of(()))
    with out_of_memory(subject, "_forward", 2), pytest.raises(TrainingMemoryError) as error:
        next(subject.warm_draft(packs(), 1))
    assert str(error.value).startswith("out of memory in the policy's forward, with a micro-batch of")


def test_running_out_on_waking_is_not_a_micro_batchs_fault() -> None:
    subject = trainer(run_of())
    subject.step(packs())
    subject.sleep(TAGS)
    with out_of_memory(subject.memory, "_settle", 1), pytest.raises(TrainingMemoryError) as error:
        subject.wake()
    assert "had moved away: the trainer holds" in str(error.value) and "token_budget" not in str(error.value)


@pytest.mark.parametrize(
    ("owner", "name", "at", "phase"),
    [
        (lambda t: t, "_forward", 2, "the policy's forward, "),
        (lambda t: Tensor, "backward", 1, "the policy's backward, "),
        (lambda t: Tensor, "backward", 2, "the draft's forward and backward, "),
        (lambda t: t.draft.optimizer, "step", 1, "the optimizer"),
        (lambda t: t.optimizer, "step", 1, "the optimizer"),
    ],
    ids=["forward", "backward", "draft", "draft's optimizer", "optimizer"],
)
def test_a_step_that_is_given_up_leaves_no_trace(owner: Any, name: str, at: int, phase: str) -> None:
    """Unless the optimizer may have written already."""
    subject, other = (trainer(run_of(())) for _ in range(2))
    for each in (subject, other):
        each.step(packs())
        each.freeze_draft()
    with out_of_memory(owner(subject), name, at), pytest.raises(TrainingMemoryError) as error:
        subject.step(packs())
    assert str(error.value).startswith(f"out of memory in {phase}")
    assert error.value.survivable == (phase != "the optimizer")
    if error.value.survivable:
        smaller = repack(packs(), 8)
        got, expected = (repr(replace(each.step(smaller), draft_seconds=0.0)) for each in (subject, other))
        assert got == expected
        assert_same(subject._owned(), other._owned())


def test_the_step_is_taken_again_in_smaller_parts(caplog: pytest.LogCaptureFixture) -> None:
    """As if it had been packed so, but for rounding; and again only once in a run."""
    rules = run_of((), oom_retry=True, token_budget=16)
    subject, other = trainer(rules), trainer(rules)
    budget = TokenBudget(rules.train)
    for each in (subject, other):
        each.step(packs())
    with out_of_memory(subject, "_forward", 2), caplog.at_level(logging.WARNING):
        terms = budget.run(subject.step, packs())
    assert budget.tokens == 8 and subject.version == 2
    (record,) = caplog.records
    assert record.getMessage().endswith("The run goes on with train.token_budget = 8")
    assert terms.policy == pytest.approx(other.step(packs(budget=8)).policy, rel=1e-5)
    assert_near(subject._owned(), other._owned(), 1e-5)
    sizes: list[list[int]] = []
    budget.run(lambda micro: sizes.append([len(b.tokens) for b in micro]), packs())
    assert sorted(sizes[0]) == sorted(len(b.tokens) for b in packs(budget=8))  # from now on
    with out_of_memory(subject, "_forward", 2), pytest.raises(TrainingMemoryError):
        budget.run(subject.step, packs())
    assert budget.tokens == 8


@pytest.mark.parametrize(("retry", "name"), [(False, "_forward"), (True, "optimizer")])
def test_what_is_not_survived(retry: bool, name: str) -> None:
    rules = run_of((), oom_retry=retry)
    subject, budget = trainer(rules), TokenBudget(rules.train)
    owner = subject.optimizer if name == "optimizer" else subject
    with out_of_memory(owner, "step" if name == "optimizer" else name, 1), pytest.raises(TrainingMemoryError):
        budget.run(subject.step, packs())
    assert budget.tokens == TrainConfig().token_budget


def _megatron_retry(arguments: Any, table: dict[str, Any]) -> int:
    from miles_spec.train.megatron import MegatronTrainer

    from .test_megatron import _draft, _model

    made = []
    for _ in range(2):
        model = _model("llama")
        made.append(MegatronTrainer(model, _draft(model), replace(run_of(()), megatron=table), "cpu"))
    subject, other = made
    survived = 0
    for _ in range(2):  # before any step was whole, and after
        for fault in (out_of_memory(subject, "_logprobs", 2), _last_backward(subject, len(packs()))):
            with fault, pytest.raises(TrainingMemoryError) as error:
                subject.step(packs())
            survived += error.value.survivable
        got, expected = (repr(replace(each.step(repack(packs(), 8)), draft_seconds=0.0)) for each in made)
        assert got == expected
        assert_same(state_of(subject)[0], state_of(other)[0])
    return survived


@contextmanager
def _last_backward(subject: Any, count: int) -> Iterator[None]:
    """Fails in the backward of the `count`-th micro-batch, when some gradients are there."""
    calls = 0

    def fail(grad: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    hook = subject.policy.embedding_weight().register_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@megatron_cpu.installed
@pytest.mark.parametrize(
    "table",
    [{}, {"overlap_grad_reduce": True}, {"overlap_grad_reduce": True, "bucket_size": 1}],
    ids=["plain", "overlap", "overlap by parameter"],
)
def test_a_step_of_megatron_that_is_given_up_leaves_no_trace(table: dict[str, Any]) -> None:
    assert megatron_cpu.run(_megatron_retry, table, 1, table) == [4]


def _numbers_of_micro_batches(arguments: Any, table: dict[str, Any]) -> dict[str, Tensor]:
    from miles_spec.train.megatron import MegatronTrainer

    from .test_megatron import _draft, _model

    model = _model("llama")
    subject = MegatronTrainer(model, _draft(model), replace(run_of(()), megatron=table), "cpu")
    for budget in (64, 8, 16):
        subject.step(repack(packs(), budget))
    return state_of(subject)[0]


@megatron_cpu.installed
def test_steps_of_other_numbers_of_micro_batches() -> None:
    """Gradients that are reduced while the backward goes on are whole by then."""
    plain, overlapped = (
        megatron_cpu.run(_numbers_of_micro_batches, table, 2, table)[0] for table in ({}, {"overlap_grad_reduce": True})
    )
    assert_same(overlapped, plain)


@pytest.mark.gpu
def test_a_gpu_gets_its_memory_back() -> None:
    from transformers import AutoModelForCausalLM

    sizes = dict(hidden_size=256, intermediate_size=1024, vocab_size=4096, head_dim=64)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", **sizes), attn_implementation=NAME)
    draft = DraftHead.attach(model, EAGLE, None, torch.Generator().manual_seed(1))
    subject = TorchTrainer(model, draft, config(offload=TAGS), "cuda")
    samples = random_samples([(4, 7), (3, 9)])
    options: Any = dict(aggregation="sequence", max_new_tokens=9, minibatches=1)
    [micro] = pack(samples, [1.0, -1.0], token_budget=64, device="cuda", **options)
    subject.step(micro)
    before = {name: tensor.clone().cpu() for name, tensor in subject._owned().items()}
    expected = {tag: sum(size for _, size in found) for tag, found in subject.memory._storages().items()}
    for tags in (("optimizer",), TAGS):
        start = torch.cuda.memory_allocated()
        subject.sleep(tags)
        freed = start - torch.cuda.memory_allocated()
        wanted = sum(expected[tag] for tag in {*tags, GRADIENTS})
        assert wanted <= freed <= wanted + 512 * sum(map(len, storages(subject).values()))
        subject.wake()
    assert_same({name: tensor.cpu() for name, tensor in subject._owned().items()}, before)
    assert all(chunk.is_pinned() for chunks in subject.memory._hosts.values() for chunk in chunks)
