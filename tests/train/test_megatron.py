"""The Megatron trainer against the torch trainer, and against itself over every layout of ranks."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import megatron_cpu
from conftest import state_of, tiny_config
from miles_spec.config import RunConfig
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE, EAGLE3, NEXTN
from miles_spec.kernels.attention import NAME
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.types import LossTerms, PackedBatch
from oracles.samples import random_samples

from .test_torch_trainer import LENGTHS, assert_near, assert_same, batches, config

pytestmark = megatron_cpu.installed

STEPS = 3
Outcome = tuple[list[LossTerms], dict[str, Tensor], dict[str, Tensor]]
"""Terms of each step, then the checkpoint's tensors of policy and of draft."""


def _model(family: str, layers: int = 2) -> Any:
    """Tiny, of sizes that 2 and 4 ranks divide."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=64, num_hidden_layers=layers, num_attention_heads=4)
    if family != "deepseek_v3":
        sizes["num_key_value_heads"] = 2
    made = AutoModelForCausalLM.from_config(tiny_config(family, **sizes), attn_implementation=NAME).eval()
    for name, buffer in made.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    return made


def _packs() -> list[PackedBatch]:
    samples = random_samples(LENGTHS)
    packs = batches(samples)
    # as a second minibatch and a reference would have it
    return [replace(pack, old_logprobs=pack.rollout_logprobs - 0.05) for pack in packs]


def _run(**train: Any) -> RunConfig:
    # small steps: AdamW makes as much of the rounding of a gradient near 0 as of one that is not
    return config(
        rollout={"temperature": 0.8, "verify": "rejection"}, draft={"lr": 1e-3}, **{"tis_cap": 1.5, "lr": 1e-3, **train}
    )


def _outcome(trainer: Any, packs: Sequence[PackedBatch], steps: int = STEPS) -> Outcome:
    terms = [trainer.step(packs) for _ in range(steps)]
    tensors, _ = state_of(trainer)
    policy = {name: t.clone() for name, t in tensors.items() if name.startswith("policy")}
    return terms, policy, {name: t.clone() for name, t in tensors.items() if name.startswith(("draft", "frozen"))}


def _draft(model: Any) -> DraftHead:
    """Where the model has an MTP layer, that."""
    spec = NEXTN if model.config.model_type in ("deepseek_v3", "glm4_moe") else EAGLE
    return DraftHead.attach(model, spec, None, torch.Generator().manual_seed(1))


@cache
def _oracle(family: str) -> Outcome:
    model = _model(family)
    trainer = TorchTrainer(model, _draft(model), _run(), "cpu")
    trainer.freeze_draft()
    return _outcome(trainer, _packs())


def _trained(arguments: Any, table: Mapping[str, Any], family: str, drafts: bool) -> Outcome:
    from miles_spec.train.megatron import MegatronTrainer

    model = _model(family)
    run = replace(_run(), megatron=dict(table))
    trainer = MegatronTrainer(model, _draft(model) if drafts else None, run, "cpu")
    if drafts:
        trainer.freeze_draft()
    return _outcome(trainer, _packs())


_seen: dict[str, Outcome] = {}


def megatron(table: Mapping[str, Any], size: int, family: str = "llama", drafts: bool = True) -> Outcome:
    """What rank 0 has in the end; terms are the same on all. Run once for all tests that ask."""
    key = repr((table, size, family, drafts))
    if key not in _seen:
        outcomes = megatron_cpu.run(_trained, table, size, table, family, drafts)
        assert all(repr(o[0]) == repr(outcomes[0][0]) for o in outcomes)
        _seen[key] = outcomes[0]
    return _seen[key]


TP, PP, CP, EP, SP = (
    f"{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context", "expert_model", "sequence")
)
LAYOUTS: list[tuple[dict[str, Any], int]] = [
    ({}, 1),
    ({}, 2),
    ({CP: 2}, 2),
    ({CP: 4}, 4),
    ({TP: 2}, 2),
    ({TP: 2, "sequence_parallel": True}, 2),
    ({PP: 2}, 2),
    ({PP: 2, CP: 2}, 4),
    ({PP: 2, TP: 2}, 4),
    ({TP: 2, CP: 2, "sequence_parallel": True}, 4),
]


def _ident(value: Any) -> str | None:
    return "-".join(f"{k.split('_')[0]}{v}" for k, v in value.items()) or "dp" if isinstance(value, dict) else None


DEEPSEEK: list[tuple[dict[str, Any], int]] = [
    ({}, 2),
    ({CP: 2}, 2),
    ({TP: 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1}, 2),
    ({PP: 2}, 2),
    ({EP: 2}, 2),
]


@pytest.mark.parametrize(
    ("family", "table", "size"),
    [*(("llama", *layout) for layout in LAYOUTS), *(("deepseek_v3", *layout) for layout in DEEPSEEK)],
    ids=_ident,
)
def test_steps_are_those_of_the_torch_trainer(family: str, table: dict[str, Any], size: int) -> None:
    """Losses, estimates, weights, moments and buffers of policy and draft after three steps."""
    terms, policy, draft = megatron(table, size, family)
    for got, expected in zip(terms, _oracle(family)[0], strict=True):
        for name in ("policy", "entropy", "grad_norm", "rollout_kl", "rollout_logprob_diff", "clip_fraction", "draft"):
            assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-6), name
        assert got.draft_by_depth == pytest.approx(expected.draft_by_depth, rel=1e-4)
        assert got.acceptance.keys() == expected.acceptance.keys() == {"cotrained", "frozen"}
        for which, estimate in expected.acceptance.items():
            assert got.acceptance[which].accept_length == pytest.approx(estimate.accept_length, rel=1e-4)
    assert_near(policy, _oracle(family)[1], 1e-5)
    assert_near(draft, _oracle(family)[2], 1e-5)


@pytest.mark.parametrize(
    ("family", "table", "size"),
    [
        ("qwen3", {TP: 2}, 2),
        ("qwen2", {TP: 2, PP: 2}, 4),
        ("qwen3_moe", {EP: 2}, 2),
        # gloo cannot gather the experts' unequal numbers of tokens over tensor-parallel ranks
        ("qwen3_moe", {TP: 2, EP: 2, "expert_tensor_parallel_size": 1, "sequence_parallel": True}, 4),
        ("glm4_moe", {PP: 2, EP: 2}, 4),
    ],
    ids=str,
)
def test_families_and_experts(family: str, table: dict[str, Any], size: int) -> None:
    terms, policy, draft = megatron(table, size, family)
    assert terms[-1].grad_norm == pytest.approx(_oracle(family)[0][-1].grad_norm, rel=1e-4)
    assert_near(policy, _oracle(family)[1], 1e-5)
    assert_near(draft, _oracle(family)[2], 1e-5)


@pytest.mark.parametrize(
    ("family", "table", "size"),
    [*(("llama", *layout) for layout in LAYOUTS), *(("deepseek_v3", *layout) for layout in DEEPSEEK[1:3])],
    ids=_ident,
)
def test_the_policy_is_the_same_with_and_without_a_draft(family: str, table: dict[str, Any], size: int) -> None:
    """Weights and moments bit for bit."""
    assert_same(megatron(table, size, family)[1], megatron(table, size, family, drafts=False)[1])


@pytest.mark.parametrize(("table", "size"), DEEPSEEK[3:], ids=_ident)
def test_what_experts_are_chosen_by_is_kept_and_stays(table: dict[str, Any], size: int) -> None:
    kept = {name: buffer for name, buffer in _model("deepseek_v3").named_buffers() if "e_score" in name}
    policy = megatron(table, size, "deepseek_v3")[1]
    assert_same({name: policy[f"policy.{name}"] for name in kept}, kept)


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize("table", [RECOMPUTE, {"recompute_granularity": "selective"}], ids=["full", "selective"])
def test_recomputed_activations_change_nothing(table: dict[str, Any]) -> None:
    """Under a pipeline, where a micro-batch is recomputed after the next one's forward."""
    assert_near(megatron({PP: 2, **table}, 2)[1], _oracle("llama")[1], 1e-5)


def _resumed(arguments: Any, table: Mapping[str, Any], saved: Any, steps: int, family: str) -> Any:
    """`steps` steps from the start, or from what was saved; the state at their end."""
    from miles_spec.train.megatron import MegatronTrainer

    model = _model(family)
    for name, buffer in model.named_buffers():
        if saved is not None and name.endswith("e_score_correction_bias"):
            buffer.zero_()  # so that it has to come from what was saved
    trainer = MegatronTrainer(model, _draft(model), replace(_run(), megatron=dict(table)), "cpu")
    trainer.freeze_draft()
    if saved is not None:
        trainer.load_state(*saved)
    for _ in range(steps):
        trainer.step(_packs())
    tensors, values = state_of(trainer)
    return {name: tensor.clone() for name, tensor in tensors.items()}, values


def resumed(table: Mapping[str, Any], size: int, saved: Any, steps: int, family: str = "llama") -> Any:
    return megatron_cpu.run(_resumed, table, size, table, saved, steps, family)[0]


@pytest.mark.parametrize(
    ("family", "table", "size"),
    [
        *(("llama", table, 2) for table in ({}, {TP: 2}, {PP: 2}, {CP: 2})),
        *(("deepseek_v3", table, 2) for table in ({PP: 2}, {EP: 2})),
    ],
    ids=_ident,
)
def test_resume_is_bit_for_bit(family: str, table: dict[str, Any], size: int) -> None:
    whole, values = resumed(table, size, None, 3, family)
    again, values_again = resumed(table, size, resumed(table, size, None, 1, family), 2, family)
    assert_same(again, whole)
    assert values == values_again and values["version"] == values["draft_version"] == 3


def _held_while_saved(arguments: Any, table: Mapping[str, Any]) -> tuple[int, int]:
    """Parameters that were gathered, and the most of them at once."""
    from miles_spec.train.megatron import MegatronTrainer

    trainer = MegatronTrainer(_model("llama"), None, replace(_run(), megatron=dict(table)), "cpu")
    values, gathered, most = trainer.optimizer.values, [], 0  # type: ignore[union-attr]

    def gather(parameter: Any, name: str) -> Tensor:
        gathered.append(weakref.ref(out := values(parameter, name)))
        return out

    trainer.optimizer.values = gather  # type: ignore[union-attr, method-assign]
    for _ in trainer.state_tensors():
        most = max(most, sum(ref() is not None for ref in gathered))
    return len(gathered), most


@pytest.mark.parametrize(("table", "size"), [({}, 2), ({TP: 2}, 4), ({PP: 2}, 4)], ids=_ident)
def test_a_checkpoint_is_gathered_one_parameter_at_a_time(table: dict[str, Any], size: int) -> None:
    for gathered, most in megatron_cpu.run(_held_while_saved, table, size, table):
        assert gathered > 12 and most == 1


def _emptied(arguments: Any) -> tuple[set[str], bool]:
    """Where the weights of a model lie whose trainer consumed it, and whether that has them."""
    from miles_spec.train.megatron import MegatronTrainer

    model, other = _model("llama"), _model("llama")
    trainer = MegatronTrainer(model, None, _run(), "cpu", consume=True)
    weights = dict(trainer.weights("target"))
    return {p.device.type for p in model.parameters()}, all(
        torch.equal(weights[name], tensor) for name, tensor in other.named_parameters()
    )


def test_a_model_that_nobody_else_needs_is_left_empty() -> None:
    assert megatron_cpu.run(_emptied, {}, 1) == [({"meta"}, True)]


def _asked_twice(arguments: Any) -> Any:
    from miles_spec.train.megatron import MegatronTrainer

    trainer = MegatronTrainer(_model("llama"), None, _run(), "cpu")
    first, second = _packs()[:2]
    return trainer.logprobs([first, second]), trainer.logprobs([first, second, first])


def test_a_micro_batch_may_be_scored_twice() -> None:
    for once, twice in megatron_cpu.run(_asked_twice, {}, 2):
        for got, expected in zip(twice, [*once, once[0]], strict=True):
            torch.testing.assert_close(got, expected)


def _without_frozen(arguments: Any) -> Any:
    from miles_spec.train.megatron import MegatronTrainer

    trainers = []
    for _ in range(2):
        model = _model("llama")
        trainers.append(MegatronTrainer(model, _draft(model), _run(), "cpu"))
    first, second = trainers
    second.freeze_draft()
    second.load_state(*state_of(first))
    tensors, values = state_of(second)
    return list(tensors), values


def test_a_state_without_a_frozen_copy_leaves_none() -> None:
    [(names, values)] = megatron_cpu.run(_without_frozen, {}, 1)
    assert any(name.startswith("draft.") for name in names) and not any(name.startswith("frozen") for name in names)
    assert values["draft_frozen_version"] is None


@pytest.mark.parametrize(("family", "other"), [("llama", TP), ("deepseek_v3", EP)])
def test_a_checkpoint_goes_to_any_layout_and_to_the_torch_trainer(family: str, other: str) -> None:
    """The values are those that were saved; the next step is near."""
    saved = resumed({PP: 2}, 2, None, 1, family)
    for table, size in (({other: 2, CP: 2}, 4), ({}, 1)):
        assert_same(resumed(table, size, saved, 0, family)[0], saved[0])
    torch_trainer = TorchTrainer(model := _model(family), _draft(model), _run(), "cpu")
    torch_trainer.freeze_draft()
    torch_trainer.load_state(*saved)
    assert_same(state_of(torch_trainer)[0], saved[0])
    back = resumed({other: 2}, 2, state_of(torch_trainer), 1, family)[0]
    torch_trainer.step(_packs())
    named = {name: tensor for name, tensor in state_of(torch_trainer)[0].items() if not name.startswith("random")}
    assert_near({name: back[name] for name in named}, named, 1e-5)


def _loaded(arguments: Any, change: str) -> str:
    """What is said of a checkpoint that does not fit, after which nothing has changed."""
    from miles_spec.train.megatron import MegatronTrainer

    model = _model("llama")
    ids = torch.arange(0, 64, 2)
    draft = DraftHead.attach(model, EAGLE, ids, torch.Generator().manual_seed(1))
    trainer = MegatronTrainer(model, draft, _run(), "cpu")
    trainer.step(_packs())
    tensors, values = state_of(trainer)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    name = "policy.model.norm.weight"
    if change == "vocabulary":
        tensors["draft.vocab_ids"] = ids + 1
    elif change == "missing":
        del tensors[name]
    elif change == "misshapen":
        tensors[name] = tensors[name][:-1]
    else:
        tensors["policy.more"] = tensors[name]
    with pytest.raises(ValueError) as error:
        trainer.load_state({**tensors, "random.cpu": before["random.cpu"]}, {**values, "version": 7})
    assert trainer.version == 1 and all(torch.equal(t, before[n]) for n, t in state_of(trainer)[0].items())
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("vocabulary", "'draft.vocab_ids' differs: the checkpoint's draft is over another vocabulary than this run's"),
        ("missing", "the checkpoint lacks tensor 'policy.model.norm.weight'; it is of a run of another configuration"),
        ("misshapen", "tensor 'policy.model.norm.weight' has shape [31] in the checkpoint and [32] in this run"),
        ("more", "the checkpoint has tensor 'policy.more', for which this run's configuration has no place"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change: str, said: str) -> None:
    assert megatron_cpu.run(_loaded, {}, 1, change) == [said]


def _passes(arguments: Any, table: Mapping[str, Any]) -> Any:
    """What the other methods give: log-probabilities of policy and reference, the draft's own steps, the weights."""
    from miles_spec.train.megatron import MegatronTrainer

    model = _model("llama")
    run = replace(_run(kl_coef=0.1), megatron=dict(table))
    return _other_methods(MegatronTrainer(model, _draft(model), run, "cpu"))


def _other_methods(trainer: Any) -> Any:
    packs = [replace(pack, ref_logprobs=pack.rollout_logprobs - 0.1) for pack in _packs()]
    before = trainer.logprobs(packs)
    trainer.step(packs)
    after, reference = trainer.logprobs(packs), trainer.logprobs(packs, reference=True)
    losses = [terms.draft for terms in trainer.warm_draft(packs[:1], 2)]
    trained, estimate = trainer.train_draft(packs, lr_scale=0.5), trainer.estimate_draft(packs)
    weights = {name: tensor.clone() for name, tensor in trainer.weights("target")}
    drafts = {name: tensor.clone() for name, tensor in trainer.weights("draft")}
    return before, after, reference, losses, trained.draft, estimate.acceptance["cotrained"], weights, drafts


@pytest.mark.parametrize(("table", "size"), [({PP: 2}, 2), ({TP: 2, CP: 2}, 4)], ids=_ident)
def test_the_other_methods(table: dict[str, Any], size: int) -> None:
    model = _model("llama")
    expected = _other_methods(TorchTrainer(model, _draft(model), _run(kl_coef=0.1), "cpu"))
    got = megatron_cpu.run(_passes, table, size, table)[0]
    for ours, theirs in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert got[3] == pytest.approx(expected[3], rel=1e-4) and got[4] == pytest.approx(expected[4], rel=1e-4)
    assert got[5].accept_length == pytest.approx(expected[5].accept_length, rel=1e-4)
    assert_near(got[6], expected[6], 3e-5)
    assert_near(got[7], expected[7], 3e-5)


def _few(arguments: Any) -> Any:
    """One pack on two data-parallel ranks, then one without a token that counts, then a gradient that is not finite."""
    from miles_spec.train.megatron import MegatronTrainer

    model = _model("llama")
    trainer = MegatronTrainer(model, _draft(model), _run(), "cpu")
    [pack] = batches(random_samples(LENGTHS), budget=1000)
    one = trainer.step([pack])
    none = trainer.step([replace(pack, loss_mask=torch.zeros_like(pack.loss_mask))])
    before = state_of(trainer)[0]
    before = {name: tensor.clone() for name, tensor in before.items()}
    broken = replace(pack, weights=pack.weights * float("nan"))
    with pytest.raises(FloatingPointError, match="at version 2; its weights are unchanged"):
        trainer.step([broken])
    after = state_of(trainer)[0]
    policy = [name for name in before if name.startswith("policy")]
    return one, none, all(torch.equal(before[name], after[name]) for name in policy)


def test_fewer_packs_than_ranks_and_nothing_to_learn_from() -> None:
    [pack] = batches(random_samples(LENGTHS), budget=1000)
    model = _model("llama")
    oracle = TorchTrainer(model, _draft(model), _run(), "cpu")
    expected = oracle.step([pack])
    for one, none, unchanged in megatron_cpu.run(_few, {}, 2):
        assert one.policy == pytest.approx(expected.policy, rel=1e-5) and one.draft == pytest.approx(expected.draft)
        assert none.grad_norm == none.policy == none.draft == 0
        assert unchanged


@pytest.mark.parametrize(("table", "size"), [({TP: 2, "sequence_parallel": True}, 2), ({CP: 2}, 2)], ids=_ident)
@pytest.mark.parametrize("more", [{}, RECOMPUTE], ids=["", "recomputed"])
def test_a_draft_that_reads_states_between_the_layers(table: dict[str, Any], size: int, more: dict[str, Any]) -> None:
    model = _model("llama", layers=4)
    trainer = TorchTrainer(model, _aux_draft(model), _run(), "cpu")
    _, _, expected = _outcome(trainer, _packs())
    assert_near(megatron_cpu.run(_aux, {**table, **more}, size, {**table, **more})[0], expected, 1e-5)


def _aux_draft(model: Any) -> DraftHead:
    """With a head of its own, over every other token."""
    return DraftHead.attach(model, EAGLE3, torch.arange(0, 64, 2), torch.Generator().manual_seed(1))


def _aux(arguments: Any, table: Mapping[str, Any]) -> dict[str, Tensor]:
    from miles_spec.train.megatron import MegatronTrainer

    model = _model("llama", layers=4)
    trainer = MegatronTrainer(model, _aux_draft(model), replace(_run(), megatron=dict(table)), "cpu")
    drafted = _outcome(trainer, _packs())[2]
    assert not trainer.policy._tapped  # or the last micro-batch's would stay while servers have the GPU
    return drafted


def _refused(arguments: Any, family: str, table: Mapping[str, Any], aux: bool) -> str:
    from miles_spec.train.megatron import MegatronTrainer

    model = _model(family, layers=4)
    draft = DraftHead.attach(model, EAGLE3) if aux else _draft(model)
    try:
        MegatronTrainer(model, draft, replace(_run(), megatron=dict(table)), "cpu")
    except ValueError as error:
        return str(error)
    return ""


def test_what_is_not_supported_is_refused_by_name() -> None:
    """Before a weight is loaded; what `[megatron]` itself may not say is in test_megatron_args.py."""

    def refused(family: str, table: Mapping[str, Any], aux: bool = False) -> str:
        groups = table if aux else {}
        return str(megatron_cpu.run(_refused, groups, 2 if aux else 1, family, table, aux)[0])

    assert refused("gemma", {}).startswith("gemma: no mapping to Megatron")
    assert "1 ranks" in refused("llama", {TP: 4})
    assert "EAGLE3" in refused("llama", {PP: 2}, aux=True)


def _updated(arguments: Any, table: Mapping[str, Any]) -> Any:
    """Of a run with two updates of the draft in a step: its terms, draft and version."""
    from miles_spec.train.megatron import MegatronTrainer

    model, run = _model("llama"), _run()
    run = replace(run, draft=replace(run.draft, updates=2))
    if arguments is None:
        trainer: Any = TorchTrainer(model, _draft(model), run, "cpu")
    else:
        trainer = MegatronTrainer(model, _draft(model), replace(run, megatron=dict(table)), "cpu")
    terms, _, draft = _outcome(trainer, _packs(), 2)
    return terms, draft, state_of(trainer)[1]["draft_version"]


@pytest.mark.parametrize(("table", "size"), [({PP: 2}, 2), ({CP: 2}, 2)], ids=_ident)
def test_updates_of_the_draft_within_a_step_are_those_of_the_torch_trainer(table: Mapping[str, Any], size: int) -> None:
    want, drafts, version = _updated(None, {})
    got, learnt, taken = megatron_cpu.run(_updated, table, size, table)[0]
    assert version == taken == 4
    assert_near(learnt, drafts, 1e-5)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.draft == pytest.approx(theirs.draft, rel=1e-4)
        estimates = [terms.acceptance["cotrained"] for terms in (mine, theirs)]
        assert estimates[0].verify_steps == pytest.approx(estimates[1].verify_steps, rel=1e-4)
        assert estimates[0].accepted == pytest.approx(estimates[1].accepted, rel=1e-4)


def _fitted(arguments: Any, table: Mapping[str, Any]) -> dict[str, Tensor]:
    from miles_spec.train.megatron import MegatronTrainer

    model = _model("llama")
    trainer = MegatronTrainer(model, _draft(model), replace(_run(), megatron=dict(table)), "cpu")
    trainer.fit_draft(_packs())
    return {name: t.clone() for name, t in state_of(trainer)[0].items() if name.startswith("draft.fc")}


@pytest.mark.parametrize(("table", "size"), [({}, 2), ({CP: 2}, 2), ({TP: 2}, 2), ({PP: 2}, 2)], ids=_ident)
def test_the_closed_form_of_a_draft_is_that_of_the_torch_trainer(table: Mapping[str, Any], size: int) -> None:
    model = _model("llama")
    oracle = TorchTrainer(model, _draft(model), _run(), "cpu")
    oracle.fit_draft(_packs())
    expected = {name: t for name, t in state_of(oracle)[0].items() if name.startswith("draft.fc")}
    found, *_ = megatron_cpu.run(_fitted, table, size, table)
    # few tokens for as many unknowns: the states' own rounding comes through enlarged
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-4 * float(tensor.abs().max()))
