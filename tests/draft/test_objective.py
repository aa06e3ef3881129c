from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from conftest import FAMILIES as TARGETS
from conftest import tiny_model
from distributed import Ranks
from miles_spec.draft import states
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.objective import DraftObjective, objective
from miles_spec.draft.spec import EAGLE, EAGLE3, MIMO, NEXTN, QWEN_MTP, DraftSpec
from miles_spec.draft.unroll import unroll
from miles_spec.kernels.attention import PackedAttention
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.logprob import logprob
from miles_spec.kernels.shift import draft_targets
from oracles import losses
from oracles.numbers import relative_error

PROMPT, RESPONSE, DEPTH = 3, 10, 3


@dataclass(frozen=True)
class Pack:
    """A target with a pack of its own samples."""

    model: Any
    args: dict[str, Any]
    """What `objective` takes after the head."""
    temperature: float


def _forward(model: Any, layout: PackedLayout, tokens: Tensor) -> Tensor:
    positions = layout.positions[None]
    out = model.model(tokens[None], position_ids=positions, attend=PackedAttention(layout), use_cache=False)
    return out.last_hidden_state[0]


@cache
def _pack(family: str = "llama", temperature: float = 1.0, sequences: int = 12, layers: int = 2) -> Pack:
    model = tiny_model(family, layers=layers)
    model.requires_grad_(True)
    g = torch.Generator().manual_seed(11)
    head = model.lm_head.weight
    rows = torch.randint(3, 61, (sequences, PROMPT), generator=g)
    with torch.no_grad():
        for _ in range(RESPONSE):
            layout = PackedLayout.make([rows.shape[1]] * sequences)
            hidden = _forward(model, layout, rows.flatten()).view(*rows.shape, -1)
            probs = torch.softmax(hidden[:, -1] @ head.T / temperature, -1)
            rows = torch.cat([rows, torch.multinomial(probs, 1, generator=g)], dim=1)
        layout, tokens = PackedLayout.make([rows.shape[1]] * sequences), rows.flatten()
        hidden = _forward(model, layout, tokens)
        scored = logprob(hidden, head, tokens.roll(-1), temperature=temperature)
    args = dict(
        embed_weight=model.get_input_embeddings().weight.detach(),
        lm_head_weight=head.detach(),
        hidden=hidden,
        layout=layout,
        tokens=tokens,
        loss_mask=layout.positions >= PROMPT,
        lse=scored.lse,
        logprobs=scored.logprob,
    )
    return Pack(model, args, temperature)


def _layers(spec: DraftSpec) -> int:
    return 4 if spec.reads == "aux" else 2


def _head(pack: Pack, vocab_ids: Tensor | None = None, spec: DraftSpec = EAGLE) -> DraftHead:
    head = DraftHead.attach(pack.model, spec, vocab_ids, generator=torch.Generator().manual_seed(0))
    if head.lm_head is not None:
        # trained: no longer the teacher's
        with torch.no_grad():
            head.lm_head.weight.add_(
                0.1 * torch.randn(head.lm_head.weight.shape, generator=torch.Generator().manual_seed(3))
            )
    return head


def _read(pack: Pack, head: DraftHead) -> Tensor:
    """What `head` reads of the pack's target."""
    layout, tokens = pack.args["layout"], pack.args["tokens"]
    positions = layout.positions[None]
    with torch.no_grad():
        _, read = states.run(
            pack.model.model,
            head,
            tokens[None],
            position_ids=positions,
            attend=PackedAttention(layout),
            use_cache=False,
        )
    return read[0]


def _objective(pack: Pack, head: DraftHead, **how: Any) -> DraftObjective:
    settings = dict(depth=DEPTH, loss="ramp", ramp=0.5, rule="rejection", temperature=pack.temperature)
    return objective(head, **_given(pack, head), **{**settings, **how})


def _given(pack: Pack, head: DraftHead) -> dict[str, Any]:
    """What the objective takes of the target."""
    args = {k: v for k, v in pack.args.items() if k != "lm_head_weight"}
    return {**args, "states": _read(pack, head), "target_head": head.target_rows(pack.args["lm_head_weight"])}


def _end_to_end(acceptances: list[list[Tensor]]) -> Tensor:
    """Sum over rows of the expected accepted tokens, `acceptances[row][depth]`."""
    total = torch.zeros((), dtype=torch.float64)
    for row in acceptances:
        alive = torch.ones((), dtype=torch.float64)
        for a in row:
            alive = alive * a
            total = total + alive
    return total


@pytest.mark.parametrize(
    ("spec", "rule", "reduced"),
    [
        *((EAGLE, rule, reduced) for rule in ("greedy", "target", "rejection") for reduced in (False, True)),
        *((EAGLE3, "target", reduced) for reduced in (False, True)),
        (NEXTN, "rejection", True),
        (MIMO, "target", False),
    ],
)
def test_losses_and_gradients_from_the_contract(rule: str, reduced: bool, spec: DraftSpec) -> None:
    """Labels, teachers and weights looked up row by row from the contract's text, gradients by plain autograd: those of
    `tv` are the gradients of the expected accepted tokens."""
    pack = _pack(temperature=0.8, layers=_layers(spec))
    ids = torch.arange(0, 61, 2) if reduced else torch.arange(61)
    head = _head(pack, ids if reduced else None, spec)
    a = pack.args
    targets = draft_targets(a["tokens"], a["loss_mask"], a["layout"], DEPTH)
    unrolled = unroll(head, a["embed_weight"], _read(pack, head), targets, a["layout"])
    teaching = a["lm_head_weight"][ids].double()
    weight = head.head_rows(a["lm_head_weight"]).double()
    sums = {name: [torch.zeros((), dtype=torch.float64) for _ in range(DEPTH)] for name in ("ce", "kl", "tv")}
    acceptances: dict[int, list[Tensor]] = {}
    counts = [0] * DEPTH
    for d, t in targets.mask.nonzero().tolist():
        state = unrolled.flat[unrolled.index(torch.tensor(d), torch.tensor(t))].double()
        u = t + d + 1
        label = (ids == a["tokens"][u + 1]).nonzero().flatten().tolist()
        logits, teacher = weight @ state / 0.8, teaching @ a["hidden"][u].double() / 0.8
        scores = {"lse": a["lse"][u].double(), "label_logprob": a["logprobs"][u].double()}
        row = losses.draft_row(logits, teacher, label[0] if label else -1, rule, **scores)
        for name in sums:
            sums[name][d] = sums[name][d] + getattr(row, name)
        acceptances.setdefault(t, []).append(1 - row.tv)
        counts[d] += 1
    end_to_end = -_end_to_end(list(acceptances.values()))
    parameters = list(head.parameters())
    for loss, ramp in (("ce", 0.0), ("kl", 0.0), ("tv", 0.0), ("ramp", 0.25)):
        got = _objective(pack, head, loss=loss, ramp=ramp, rule=rule)
        share = {"ce": 0.0, "kl": 0.0, "tv": 1.0, "ramp": ramp}[loss]
        kind = "ce" if loss == "ce" else "kl"
        by_depth = torch.stack([(1 - share) * s + share * tv for s, tv in zip(sums[kind], sums["tv"], strict=True)])
        torch.testing.assert_close(got.loss_by_depth.double(), by_depth.detach(), rtol=1e-5, atol=1e-5)
        assert got.rows == tuple(counts)
        want = ((1 - share) * torch.stack(sums[kind]).sum() + share * end_to_end) / DEPTH
        grads = torch.autograd.grad(got.loss_sum, parameters)
        exact = torch.autograd.grad(want, parameters, retain_graph=True)
        norm = torch.cat([x.flatten() for x in exact]).norm()
        assert norm > 0
        assert torch.cat([(x - y).flatten() for x, y in zip(grads, exact, strict=True)]).norm() < 1e-4 * norm


def test_estimate_by_hand_for_the_target_rule() -> None:
    pack = _pack()
    head = _head(pack)
    a = pack.args
    with torch.no_grad():
        got = _objective(pack, head, rule="target")
        targets = draft_targets(a["tokens"], a["loss_mask"], a["layout"], DEPTH)
        right: dict[tuple[int, int], bool] = {}
        unrolled = unroll(head, a["embed_weight"], _read(pack, head), targets, a["layout"])
        for d, t in targets.mask.nonzero().tolist():
            state = unrolled.flat[unrolled.index(torch.tensor(d), torch.tensor(t))]
            right[d + 1, t] = bool((a["lm_head_weight"] @ state).argmax() == a["tokens"][t + d + 2])
    accepted = steps = 0
    size = PROMPT + RESPONSE
    for start in range(0, len(a["tokens"]), size):
        t = start + PROMPT - 1
        while t + 2 < start + size:
            run = 0
            while run < DEPTH and right.get((run + 1, t), False):
                run += 1
            accepted, steps, t = accepted + run, steps + 1, t + 1 + run
    assert accepted > 0 and (got.estimate.accepted, got.estimate.verify_steps) == (accepted, steps)


@pytest.mark.parametrize(
    ("kind", "spec", "loss"),
    [
        *((kind, EAGLE, "ramp") for kind in TARGETS),
        *(("llama", EAGLE3, loss) for loss in ("ce", "kl", "tv", "ramp")),
        ("qwen2", MIMO, "ramp"),
        ("gemma", QWEN_MTP, "ramp"),
        ("glm4_moe", NEXTN, "ramp"),
    ],
)
def test_no_gradient_leaves_the_draft(kind: str, loss: str, spec: DraftSpec) -> None:
    pack = _pack(kind, sequences=3, layers=_layers(spec))
    head = _head(pack, spec=spec)
    # even where the caller forgot to detach the LM head, the teacher or its scores
    args = _given(pack, head)
    if head.lm_head is None and head.vocab_ids is None:
        args["target_head"] = pack.model.lm_head.weight
    args["lse"] = pack.args["lse"].clone().requires_grad_()
    objective(head, **args, depth=DEPTH, loss=loss, ramp=0.5, rule="rejection", temperature=1.0).loss_sum.backward()
    assert all(p.grad is None for p in pack.model.parameters()) and args["lse"].grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def _share(
    group: dist.ProcessGroup, sharding: Any, sampled: int, spec: DraftSpec
) -> tuple[float, list[int], tuple[float, float], list[Tensor]]:
    """What one rank of a context-parallel group finds for its part of the pack, of which the last `sampled` segments
    have sampled tokens."""
    pack = _pack(layers=_layers(spec))
    head = _head(pack, spec=spec)
    whole = pack.args["layout"]
    lengths = whole.lengths
    counted = pack.args["loss_mask"] & (whole.segments >= len(lengths) - sampled)
    layout = PackedLayout.make(lengths, halo=DEPTH + 1, sharding=sharding, cp_group=group)
    shared = {k: layout.shard(pack.args[k]) for k in ("hidden", "tokens", "lse", "logprobs")}
    given = _given(pack, head)
    shared["states"] = layout.shard(given["states"])
    shared["loss_mask"] = layout.shard(counted)
    settings = dict(depth=DEPTH, loss="ramp", ramp=0.5, rule="rejection", temperature=1.0)
    got = objective(head, **{**given, **shared, "layout": layout}, **settings)
    got.loss_sum.backward()
    estimate = got.estimate.accepted, got.estimate.verify_steps
    return float(got.loss_sum.detach()), list(got.rows), estimate, [p.grad for p in head.parameters()]


@pytest.mark.parametrize(
    ("sharding", "sampled", "spec"),
    [
        *((sharding, sampled, EAGLE) for sharding in ("zigzag", "contiguous") for sampled in (12, 2)),
        ("zigzag", 12, EAGLE3),
        ("contiguous", 12, MIMO),
    ],
)
def test_ranks_of_a_cut_pack_add_up(sharding: str, sampled: int, spec: DraftSpec, ranks: Ranks) -> None:
    """Four ranks include some without a row that counts: the first, where few segments have sampled tokens, or whose
    chunks are a segment's prompt and padding."""
    ((loss, rows, estimate, grads),) = ranks.run(_share, 1, sharding, sampled, spec)
    assert estimate[0] > 0
    for size in (2, 4):
        shares = ranks.run(_share, size, sharding, sampled, spec)
        if size == 4:
            assert (min(s[1][0] for s in shares) == 0) == (sampled == 2 or sharding == "zigzag")
        assert sum(s[0] for s in shares) == pytest.approx(loss, rel=1e-5)
        assert [sum(column) for column in zip(*(s[1] for s in shares), strict=True)] == rows
        assert all(s[2] == pytest.approx(estimate, rel=1e-5) for s in shares)
        summed = [torch.stack(g).sum(0) for g in zip(*(s[3] for s in shares), strict=True)]
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(summed, grads, strict=True))


def test_an_empty_mask_gives_zero() -> None:
    pack = _pack()
    head = _head(pack)
    args = {**_given(pack, head), "loss_mask": torch.zeros_like(pack.args["loss_mask"])}
    got = objective(head, **args, depth=DEPTH, loss="ramp", ramp=0.5, rule="target", temperature=1.0)
    got.loss_sum.backward()
    assert got.loss_sum == 0 and got.rows == (0, 0, 0) and got.loss_by_depth.tolist() == [0, 0, 0]
    assert (got.estimate.accepted, got.estimate.verify_steps) == (0, 0)
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in head.parameters())


def _train(pack: Pack, loss: str, steps: int = 50) -> tuple[float, float]:
    """Estimated accept length before and after training on one pack."""
    head = _head(pack)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        got = _objective(pack, head, loss=loss, ramp=step / steps)
        if not step:
            before = got.estimate.accept_length
        optimizer.zero_grad()
        (got.loss_sum / got.rows[0]).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return before, _objective(pack, head).estimate.accept_length


@pytest.mark.parametrize("loss", ["ce", "kl", "ramp"])
def test_training_raises_the_accept_length(loss: str) -> None:
    before, after = _train(_pack(), loss)
    assert after > before + 0.6, (before, after)


def test_tv_alone_has_hardly_a_gradient_from_a_cold_start() -> None:
    """Where the draft is sure of a wrong token, KL pulls hard and TV, whose gradient carries the factor `q`, does not;
    once the two overlap, both pull."""
    pack = _pack()

    def norm(head: DraftHead, loss: str) -> float:
        grads = torch.autograd.grad(_objective(pack, head, loss=loss).loss_sum, list(head.parameters()))
        return float(torch.cat([x.flatten() for x in grads]).norm())

    warm, cold = _head(pack), _head(pack)
    with torch.no_grad():
        unused = pack.args["lm_head_weight"][0]
        cold.fc.bias.add_(20 * unused / unused.norm())
    assert _objective(pack, cold).estimate.accept_length < 1.05
    assert norm(cold, "tv") < 1e-2 * norm(cold, "kl")
    assert norm(warm, "tv") > 5e-2 * norm(warm, "kl")
