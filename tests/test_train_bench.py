"""`miles-spec bench train` in miniature: a tiny model on the CPU, Megatron in processes of its own."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import megatron_cpu
from miles_spec import train_bench
from miles_spec.cli import main
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.train_bench import (
    Plan,
    Size,
    packs,
    parameters,
    peak_flops,
    segments,
    step_flops,
    train,
)
from miles_spec.train_rows import STOCK, Row, checks
from miles_spec.types import RunError

CPU = torch.device("cpu")
TINY = Size(hidden=64, layers=2, vocab=256)
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="miniatures for a CPU")


def tiny(result: Path | None = None, **given: Any) -> list[Row]:
    options: dict[str, Any] = {"tokens": (256,), "size": TINY, "micro_batches": 1, "turns": 2, "warm_ups": 1}
    return train(result, Plan(**{**options, **given}))


@ON_CPU
def test_torch_backend_is_measured_with_and_without_a_draft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    step = TorchTrainer.step
    monkeypatch.setattr(TorchTrainer, "step", lambda self, batches: steps.append(step(self, batches)) or steps[-1])
    out = tmp_path / "train.json"
    rows = tiny(out, depths=(1, 3))
    assert [(r.backend, r.tokens, r.depth) for r in rows] == [("torch", 256, depth) for depth in (0, 1, 3)]
    assert [len(terms.draft_by_depth) for terms in steps] == [0] * 3 + [1] * 3 + [3] * 3
    assert all(len(r.turns) == 2 and r.tokens_per_s == 256 / r.step_s for r in rows if r.step_s)
    assert all(r.utilisation is None and r.gpu_peak_bytes is None for r in rows)
    assert all(r.host_peak_bytes is None or r.host_peak_bytes > 1 << 20 for r in rows)
    written = json.loads(out.read_text())
    assert len(written["rows"]) == 3 and written["settings"]["hidden"] == 64 and written["left_out"] == []
    assert [c["what"] for c in written["checks"]] == ["torch, 256 tokens: the draft's share of the step at one depth"]
    assert "policy alone" in (shown := capsys.readouterr().out) and "with draft, depth 3" in shown


@ON_CPU
def test_drafts_that_learn_from_a_share_and_over_a_part_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    drafted = []
    step = TorchTrainer.step
    monkeypatch.setattr(TorchTrainer, "step", lambda self, batches: drafted.append(self.draft) or step(self, batches))
    rows = tiny(tokens=(64,), micro_batches=2, turns=1, warm_ups=0, shares=(1.0, 0.5), draft_vocabs=(16,))
    assert [(r.depth, r.share, r.draft_vocab) for r in rows] == [(0, 1, 0), (1, 1, 0), (1, 0.5, 0), (1, 1, 16)]
    assert len({r.grad_norm for r in rows}) == 1
    sizes = [owner and owner.draft.vocab_ids is not None and len(owner.draft.vocab_ids) for owner in drafted]
    assert sizes == [None, False, False, 16]


@ON_CPU
def test_rounds_measure_every_case_again_after_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    drafted = []
    step = TorchTrainer.step
    monkeypatch.setattr(
        TorchTrainer, "step", lambda self, batches: drafted.append(bool(self.draft)) or step(self, batches)
    )
    rows = tiny(tokens=(64,), turns=2, warm_ups=0, rounds=2)
    assert drafted == [False, False, True, True] * 2
    assert [(r.depth, len(r.turns)) for r in rows] == [(0, 4), (1, 4)]
    assert all(r.step_s == statistics.median(r.turns) for r in rows)
    with pytest.raises(ValueError, match="rounds"):
        Plan(rounds=0)


@ON_CPU
def test_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = TorchTrainer._forward

    def fails(self: TorchTrainer, *inputs: Any) -> Any:
        if self.draft is not None:
            raise torch.OutOfMemoryError("injected")
        return forward(self, *inputs)

    monkeypatch.setattr(TorchTrainer, "_forward", fails)
    rows = tiny(tokens=(256, 128))
    assert [r.note for r in rows] == ["", "out of memory"] * 2
    assert [r.step_s is None for r in rows] == [False, True] * 2


@ON_CPU
def test_a_spent_budget_leaves_out_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny(tmp_path / "t.json", budget_s=-1) == []
    left = json.loads((tmp_path / "t.json").read_text())["left_out"]
    assert left == [f"torch, 256 tokens, {what}: no time was left" for what in ("policy alone", "with draft, depth 1")]
    assert "left out: torch" in capsys.readouterr().out


@ON_CPU
def test_a_round_that_is_left_out_leaves_the_row_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    late = iter([False, False, True])  # before the case, after its turn, before its second round
    monkeypatch.setattr(train_bench.Bench, "_late", lambda self: next(late))
    bench = train_bench.Bench(None, Plan(size=TINY, micro_batches=1, turns=2, warm_ups=0), CPU)
    for _ in range(2):
        bench.measure(train_bench.Case(backend="torch", tokens=64, depth=0))
    assert [len(row.turns) for row in bench.rows] == [2]
    assert bench.left_out == ["torch, 64 tokens, policy alone: no time was left for another round"]


@ON_CPU
def test_a_budget_cuts_turns_short(monkeypatch: pytest.MonkeyPatch) -> None:
    late = iter([False, False, True])  # before the case, after one turn, after two
    monkeypatch.setattr(train_bench.Bench, "_late", lambda self: next(late))
    bench = train_bench.Bench(None, Plan(size=TINY, micro_batches=1, turns=5, warm_ups=0, budget_s=60.0), CPU)
    bench.measure(train_bench.Case(backend="torch", tokens=64, depth=0))
    assert len(bench.rows[0].turns) == 2


# Megatron


def _bench(arguments: Any, given: dict[str, Any], table: dict[str, Any]) -> list[Row]:
    return tiny(**{"backends": ("megatron",), "megatron": table, "turns": 1, "warm_ups": 0, **given})


@megatron_cpu.installed
@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}])
def test_megatron_and_its_own_path(layout: dict[str, Any]) -> None:
    for rows in megatron_cpu.run(_bench, layout, 2, {"depths": (1, 2), "backends": ("torch", "megatron")}, layout):
        assert [(r.backend, r.depth) for r in rows] == [(b, d) for b in ("torch", "megatron", STOCK) for d in (0, 1, 2)]
        assert all(r.step_s and not r.note for r in rows)
        assert {r.micro_batches for r in rows if r.backend != "torch"} == {1 if layout else 2}
        norms = [c["value"] for c in checks(rows) if "norm" in c["what"]]
        assert len(norms) == (0 if layout else 3) and all(value < 1e-4 for value in norms)


@megatron_cpu.installed
def test_its_own_path_is_left_out_where_packs_are_cut() -> None:
    layout = {"context_parallel_size": 2}
    rows = megatron_cpu.run(_bench, layout, 2, {}, layout)[0]
    assert [(r.backend, r.depth) for r in rows] == [("megatron", 0), ("megatron", 1)]


def _full(arguments: Any, result: Path) -> str:
    """A bench whose ranks run out of memory with a draft; the error."""
    from miles_spec.train.megatron import MegatronTrainer

    logprobs = MegatronTrainer._logprobs

    def fails(self: MegatronTrainer, *inputs: Any) -> Any:
        if self.has_draft:
            raise torch.OutOfMemoryError("injected")
        return logprobs(self, *inputs)

    MegatronTrainer._logprobs = fails  # type: ignore[method-assign]
    try:
        _bench(arguments, {"result": result}, {})
    except RunError as error:
        return str(error)
    finally:
        MegatronTrainer._logprobs = logprobs  # type: ignore[method-assign]
    return ""


@megatron_cpu.installed
def test_out_of_memory_on_ranks_is_a_row_and_the_end(tmp_path: Path) -> None:
    errors = megatron_cpu.run(_full, {}, 2, tmp_path / "t.json")
    assert all("out of memory on one of 2 ranks" in error for error in errors)
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [(r["depth"], r["note"]) for r in rows] == [(0, ""), (1, "out of memory")]


def _stock(arguments: Any, depth: int) -> tuple[float, list[str], dict[str, torch.Tensor], dict[str, Any]]:
    """Loss of a step, names of weights without a gradient, weights, and what Megatron says of its MTP."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    from miles_spec.config import RunConfig
    from miles_spec.megatron_stock import StockTrainer

    trainer = StockTrainer(TINY.config(), RunConfig(), arguments.world_size, CPU, torch.float32, depth)
    weights = {name: p.detach().clone() for name, p in trainer.module.named_parameters()}
    loss = trainer.step(packs(1, 256, TINY.vocab, CPU))
    unmoved = [name for name, p in trainer.module.named_parameters() if not p.main_grad.any()]
    return (
        loss,
        unmoved,
        weights,
        {name: values.tolist() for name, values in MTPLossLoggingHelper.tracker.items() if torch.is_tensor(values)},
    )


@megatron_cpu.installed
def test_own_path_is_the_same_model() -> None:
    """Its loss, and that of its MTP layer, near those of Hugging Face's model with the same weights."""
    loss, unmoved, weights, mtp = megatron_cpu.run(_stock, {}, 1, 1)[0]
    assert unmoved == []
    assert any(name.startswith("mtp.") for name in weights)
    (batch,) = packs(1, 256, TINY.vocab, CPU)
    model = AutoModelForCausalLM.from_config(TINY.config(), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter, value in _mapped(model, weights):
            parameter.copy_(value)
        found, start = [], 0
        for length in batch.layout.lengths:
            tokens = batch.tokens[start : start + length]
            losses = F.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
            found.append(losses[batch.loss_mask[start + 1 : start + length]])
            start += length
    assert loss == pytest.approx(float(torch.cat(found).mean()), abs=1e-5)
    assert mtp["loss_values"] == [pytest.approx(math.log(TINY.vocab), abs=0.3)]
    assert mtp["total_values"] == [int(batch.loss_mask.sum())]


def _mapped(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """Each parameter of Hugging Face's with its value out of Megatron's: queries, keys and values lie by group."""
    config = model.config
    groups, head = config.num_key_value_heads, config.head_dim
    each = config.num_attention_heads // groups
    yield model.model.embed_tokens.weight, weights["embedding.word_embeddings.weight"]
    yield model.model.norm.weight, weights["decoder.final_layernorm.weight"]
    for i, layer in enumerate(model.model.layers):
        own = {n.removeprefix(f"decoder.layers.{i}."): w for n, w in weights.items()}
        attention, mlp = layer.self_attn, layer.mlp
        qkv = own["self_attention.linear_qkv.weight"].view(groups, each + 2, head, -1)
        yield attention.q_proj.weight, qkv[:, :each].reshape(-1, config.hidden_size)
        yield attention.k_proj.weight, qkv[:, each].reshape(-1, config.hidden_size)
        yield attention.v_proj.weight, qkv[:, each + 1].reshape(-1, config.hidden_size)
        yield attention.o_proj.weight, own["self_attention.linear_proj.weight"]
        gate, up = own["mlp.linear_fc1.weight"].chunk(2)
        yield mlp.gate_proj.weight, gate
        yield mlp.up_proj.weight, up
        yield mlp.down_proj.weight, own["mlp.linear_fc2.weight"]


# What is counted


def test_packs_are_the_same_at_every_call_and_half_sampled() -> None:
    first, again = packs(2, 300, 50, CPU), packs(2, 300, 50, CPU)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert sum(float(batch.weights.sum()) for batch in first) == pytest.approx(1)
    for batch in first:
        ends = torch.tensor(batch.layout.lengths).cumsum(0)
        assert len(batch.tokens) == 300 == int(ends[-1])
        assert batch.loss_mask[ends - 1].all() and not batch.loss_mask[ends[:-1]].any()
        assert not batch.rollout_logprobs[~batch.loss_mask].any()


@pytest.mark.parametrize("tokens", [1, 2, 256, 4096, 8192, 32768])
def test_segments(tokens: int) -> None:
    for seed in range(20):
        lengths = segments(tokens, torch.Generator().manual_seed(seed))
        assert sum(lengths) == tokens
        assert min(lengths) >= min(512, max(1, tokens // 4)) and max(lengths) <= 4096


def test_flops_by_hand() -> None:
    config = TINY.config()
    (batch,) = packs(1, 256, TINY.vocab, CPU)
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 192 + 2 * 64 + 2 * 16
    assert parameters(config) == (2 * layer + 64, 256 * 64)
    seen = sum(i + 1 for n in batch.layout.lengths for i in range(n))
    expected = 6 * (2 * layer + 64) * 256 + 6 * 256 * 64 * int(batch.loss_mask.sum()) + 12 * 2 * 64 * seen
    assert step_flops(config, [batch]) == expected


def test_the_default_is_qwen3_1_7b() -> None:
    layers, head = parameters(Size().config())
    assert layers + head == pytest.approx(1.72e9, rel=0.01)


def test_peaks() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 PCIe") is None


# The command


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--backends", "jax"], "no backend 'jax'"),
        (["--tensor-model-parallel-size", "2"], "add megatron to --backends"),
        (["--depths", "0"], "at least 1"),
        (["--layers", "0"], "a width and a layer"),
        (["--shares", "0"], "a share of 0"),
        (["--draft-vocabs", "151936"], "over 151936 of 151936 tokens"),
        (["--hidden", "40"], "choose a multiple"),
        (["stray"], 'unexpected argument "stray"'),
        (["--backends", "megatron", "--tensor-model-parallel-size", "1", "2"], "must be a whole number, not [1, 2]"),
    ],
)
def test_mistakes(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", *given]) == 2
    assert message in capsys.readouterr().err


def test_command(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(train_bench, "train", lambda *given: calls.append(given))
    flags = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--recompute-granularity=full"]
    flags += ["--use-distributed-optimizer", "False"]
    own = [
        "--json",
        "t.json",
        "--backends",
        "torch",
        "megatron",
        "--tokens",
        "64",
        "--depths",
        "1",
        "3",
        "--shares",
        "1",
        "0.5",
        "--draft-vocabs",
        "32",
        "--hidden",
        "64",
    ]
    assert main(["bench", "train", *own, *flags]) == 0
    ((result, plan),) = calls
    assert result == Path("t.json") and plan.backends == ["torch", "megatron"]
    assert (plan.tokens, plan.depths, plan.shares, plan.size.hidden) == ([64], [1, 3], [1, 0.5], 64)
    assert plan.draft_vocabs == [32]
    assert plan.megatron == {
        "tensor-model-parallel-size": 2,
        "sequence-parallel": True,
        "use-distributed-optimizer": False,
        "recompute-granularity": "full",
    }


@ON_CPU
@megatron_cpu.installed
def test_megatron_without_a_gpu_is_refused() -> None:
    sizes = ["--hidden", "64", "--layers", "2", "--vocab", "256", "--tokens", "64", "--turns", "1", "--warm-ups", "0"]
    command = [sys.executable, "-m", "miles_spec.cli", "bench", "train", "--backends", "megatron", *sizes]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "Megatron needs a GPU" in ended.stderr and "Traceback" not in ended.stderr
