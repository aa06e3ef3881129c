"""Contests of the kernels with an LM head in them: the draft's losses and the policy's log-probabilities.

Invariant: floors are the matrix products that the same work cannot do without, taken by `torch.matmul` in the same run.

Dimensions: `N` rows, `M` teacher rows, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miles_spec.kernel_bench import peers
from miles_spec.kernel_bench.contests import Contest, Entry, Outcome, Setting, Truth, ready
from miles_spec.kernel_bench.measure import Call
from miles_spec.kernels.draft_loss import Mix, draft_loss
from miles_spec.kernels.linear import chunks
from miles_spec.kernels.logprob import logprob

THREE, TWO, FEWER = "floor, 3 products", "floor, 2 products", "floor, 2 1/3 products"
SLICE = 128
"""Rows of a gradient that are compared."""
CHUNK = 256
"""Rows that the float64 expressions take at once."""
SCALE = 3.0
"""Standard deviation of logits, about that of a language model's."""
BLOCK = 3
"""Rows of a drafted block."""
END_TO_END = Mix(kl=0.5, tv=0.5)
"""Its TV is weighted over blocks of `BLOCK` rows."""
MIXES = {
    "kl": Mix(kl=1.0),
    "ce": Mix(ce=1.0),
    "reverse kl": Mix(reverse_kl=1.0),
    "tv": Mix(tv=1.0),
    "kl and end-to-end tv": END_TO_END,
}
"""What is taken on the same rows; TV under the rule `rejection`."""

RECOMPUTED = "4 products: the logits twice; gives entropy, log-sum-exp and argmax too"
FILTERED = "random inputs leave its filter of small gradients little to skip"


def tolerance(setting: Setting, tv: bool = False) -> tuple[float, float]:
    """Of a mean loss, and of its gradient. That is a difference of probabilities: from logits that are rounded to half
    precision it comes out coarser by far than the loss. TV's asks on which tokens `q < p`, and rounding turns that over
    where the two are nearly equal."""
    if setting.dtype != torch.bfloat16:
        return 1e-5, 1e-5
    return 2e-3, 0.2 if tv else 0.1


def sampled(hidden: Tensor, head: Tensor) -> Tensor:
    """`[N]` tokens drawn from the model's own distribution, as labels in training are."""
    generator = torch.Generator(head.device).manual_seed(7)
    labels = []
    with torch.no_grad():
        for rows in chunks(len(hidden), CHUNK):
            logits = (hidden[rows] @ head.T).float()
            labels.append((logits - torch.empty_like(logits).exponential_(generator=generator).log_()).argmax(-1))
    return torch.cat(labels)


# draft_loss


class _Rows(NamedTuple):
    states: Tensor
    head: Tensor
    teacher: Tensor
    labels: Tensor


def row_losses(states: Tensor, head: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Every loss of each row, `[N]`, as plainly as it can be written."""
    log_q = torch.log_softmax(states @ head.T, -1)
    log_p = torch.log_softmax(teacher @ head.T, -1)
    q, p = log_q.exp(), log_p.exp()
    return {
        "kl": (p * (log_p - log_q)).sum(-1),
        "ce": -log_q.gather(-1, labels[:, None]).squeeze(-1),
        "reverse_kl": (q * (log_q - log_p)).sum(-1),
        "tv": 1 - torch.minimum(p, q).sum(-1),
    }


def mixed(losses: dict[str, Tensor], mix: Mix, of_tv: Tensor) -> Tensor:
    """The sum over rows, of which `of_tv` `[N]` weights the TV."""
    rest = mix.ce * losses["ce"] + mix.kl * losses["kl"] + mix.reverse_kl * losses["reverse_kl"]
    return (rest + mix.tv * of_tv * losses["tv"]).sum()


def block_weights(acceptance: Tensor) -> Tensor:
    """`[N]` derivative of the accepted tokens that a block of `BLOCK` rows expects in each row's acceptance."""
    n = len(acceptance)
    blocks = F.pad(acceptance, (0, -n % BLOCK)).view(-1, BLOCK).requires_grad_()
    expected = blocks.cumprod(-1).sum()
    return torch.autograd.grad(expected, blocks)[0].flatten()[:n]


def loss_truths(rows: _Rows, teacher_rows: Tensor) -> dict[str, Truth]:
    """The mean of each mix over all rows and its gradient in some states, in float64."""
    states, head, teacher, labels = rows
    wide, n = head.double(), len(states)
    with torch.no_grad():
        parts = [
            row_losses(states[part].double(), wide, teacher[teacher_rows[part]].double(), labels[part])
            for part in chunks(n, CHUNK)
        ]
    everywhere = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    weights = block_weights(1 - everywhere["tv"])
    at = torch.arange(0, n, -(-n // SLICE), device=states.device)
    x = states.detach()[at].double().requires_grad_()
    here = row_losses(x, wide, teacher[teacher_rows[at]].double(), labels[at])
    truths = {}
    for name, mix in MIXES.items():
        of_tv = weights if mix == END_TO_END else torch.ones_like(weights)
        (gradient,) = torch.autograd.grad(mixed(here, mix, of_tv[at]) / n, x, retain_graph=True)
        expected = Outcome(value=mixed(everywhere, mix, of_tv) / n, gradients=(gradient,))
        truths[name] = Truth(expected=expected, gradients_at=(at,))
    return truths


def draft_loss_contests(setting: Setting) -> Iterator[Contest]:
    """At each shape: KL against the peers on rows that have a teacher each, and ours with the other losses or without a
    gradient; then on the rows of drafted blocks, whose depths share their teachers, as training has them."""
    for vocabulary, size in setting.sizes.heads:
        yield _separate_rows(setting, vocabulary, size)
        yield _blocks(setting, vocabulary, size)


def _separate_rows(setting: Setting, vocabulary: int, size: int) -> Contest:
    n = setting.sizes.rows
    teacher, head = _teacher(setting, n, vocabulary, size)
    states = (0.9 * teacher + 0.44 * setting.randn(n, size, seed=3)).requires_grad_()
    rows = _Rows(states, head, teacher, sampled(teacher, head))
    truths = loss_truths(rows, torch.arange(n, device=setting.device))
    kl = truths["kl"]
    entries = [_ours(setting, name, truths[name], mix, rows) for name, mix in MIXES.items() if mix != END_TO_END]
    entries += [_forward_only(setting, kl, rows), _kl_peer("torch, eager", peers.eager_kl, kl, rows)]
    if setting.peers:
        entries += [
            _kl_peer("torch.compile", peers.compiled_kl, kl, rows),
            _kl_peer("flash-linear-attention, fused_kl_div", peers.fla_kl, kl, rows),
            _kl_peer("Liger, fused_linear_jsd, beta 0", peers.liger_kl, kl, rows),
        ]
    return Contest(
        kernel="draft_loss",
        case=f"N {n}, V {vocabulary}, H {size}, gradient of the states alone",
        entries=[*entries, *_floors(rows)],
        tolerance=tolerance(setting),
        figures={"V": vocabulary, "H": size},
    )


def _blocks(setting: Setting, vocabulary: int, size: int) -> Contest:
    """A public kernel is given each row's teacher anew, since it can be told of no others."""
    n = setting.sizes.rows
    index = torch.arange(n, device=setting.device)
    chain = index % BLOCK
    teacher_rows = index // BLOCK + chain
    few, head = _teacher(setting, int(teacher_rows.max()) + 1, vocabulary, size)
    states = (0.9 * few[teacher_rows] + 0.44 * setting.randn(n, size, seed=3)).requires_grad_()
    rows = _Rows(states, head, few, sampled(few, head)[teacher_rows])
    truths = loss_truths(rows, teacher_rows)
    shared: dict[str, Any] = {"teacher_rows": teacher_rows, "chain": chain, "depth": BLOCK, "floor": FEWER}
    entries = [
        _ours(setting, name, truths[name], MIXES[name], rows, **shared) for name in ("kl", "kl and end-to-end tv")
    ]
    anew = rows._replace(teacher=few[teacher_rows])
    entries.append(_kl_peer("torch, eager", peers.eager_kl, truths["kl"], anew))
    if setting.peers:
        entries += [
            _kl_peer("torch.compile", peers.compiled_kl, truths["kl"], anew),
            _kl_peer("flash-linear-attention, fused_kl_div", peers.fla_kl, truths["kl"], anew),
        ]
    return Contest(
        kernel="draft_loss",
        case=f"N {n} in blocks of {BLOCK}, V {vocabulary}, H {size}",
        entries=[*entries, *_floors(rows)],
        tolerance=tolerance(setting),
        figures={"V": vocabulary, "H": size, "depths": BLOCK},
    )


def _teacher(setting: Setting, rows: int, vocabulary: int, size: int) -> tuple[Tensor, Tensor]:
    """The target's states `[rows, H]` and its head `[V, H]`."""
    head = setting.randn(vocabulary, size, scale=SCALE * size**-0.5, seed=1)
    return setting.randn(rows, size, seed=2), head


def _ours(
    setting: Setting, name: str, truth: Truth, mix: Mix, rows: _Rows, *, floor: str = THREE, **more: Any
) -> Entry:
    def call() -> Outcome:
        loss = _mean(setting, mix, rows, **more)
        return Outcome(value=loss, gradients=torch.autograd.grad(loss, rows.states))

    return Entry(
        name=f"ours, {name}",
        kind="ours",
        load=ready(call),
        truth=truth,
        floor=floor,
        rival=name == "kl",
        tolerance=tolerance(setting, tv=mix.tv > 0),
    )


def _forward_only(setting: Setting, truth: Truth, rows: _Rows) -> Entry:
    @torch.no_grad()
    def call() -> Outcome:
        return Outcome(value=_mean(setting, MIXES["kl"], rows))

    name, value = "ours, kl, no gradient", Truth(expected=Outcome(value=truth.expected.value))
    return Entry(name=name, kind="ours", load=ready(call), truth=value, floor=TWO, rival=False)


def _mean(setting: Setting, mix: Mix, rows: _Rows, **more: Any) -> Tensor:
    states, head, teacher, labels = rows
    backend = setting.backend
    result = draft_loss(states, head, teacher, labels, mix=mix, rule="rejection", backend=backend, **more)
    return result.total / len(states)


def _kl_peer(name: str, load: Callable[[], peers.KlLoss], truth: Truth, rows: _Rows) -> Entry:
    def loaded() -> Call:
        loss_of = load()

        def call() -> Outcome:
            loss = loss_of(rows.states, rows.teacher, rows.head)
            return Outcome(value=loss, gradients=torch.autograd.grad(loss, rows.states))

        return call

    return Entry(name=name, kind="peer", load=loaded, truth=truth, floor=THREE)


def _floors(rows: _Rows) -> list[Entry]:
    """The matrix products that the losses cannot do without, at their largest: whole `[N, V]` results."""
    x, head = rows.states.detach(), rows.head
    logits = x.new_empty(len(x), len(head))
    third = x[: -(-len(x) // BLOCK)]

    def forward(states: Tensor) -> None:
        torch.matmul(states, head.T, out=logits[: len(states)])

    def floor(name: str, *parts: Call) -> Entry:
        def call() -> None:
            for part in parts:
                part()

        return Entry(name=name, kind="floor", load=ready(call))

    def backward() -> None:
        torch.matmul(logits, head)

    return [
        floor(THREE, lambda: forward(x), lambda: forward(x), backward),
        floor(FEWER, lambda: forward(x), lambda: forward(third), backward),
        floor(TWO, lambda: forward(x), lambda: forward(x)),
    ]


# logprob


def ce_truth(hidden: Tensor, head: Tensor, labels: Tensor) -> Truth:
    """The mean cross-entropy and its gradient in some states and in some rows of the head, in float64."""
    n, wide = len(hidden), head.detach().double()
    at = torch.arange(0, n, -(-n // SLICE), device=hidden.device)
    words = torch.arange(0, len(head), -(-len(head) // SLICE), device=hidden.device)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    d_head = torch.zeros(len(words), hidden.shape[1], dtype=torch.float64, device=hidden.device)
    d_hidden = torch.empty(n, hidden.shape[1], dtype=torch.float64, device=hidden.device)
    with torch.no_grad():
        for rows in chunks(n, CHUNK):
            x = hidden[rows].double()
            log_p = torch.log_softmax(x @ wide.T, -1)
            total -= log_p.gather(-1, labels[rows, None]).sum()
            d_logits = log_p.exp_()
            d_logits.scatter_add_(-1, labels[rows, None], torch.full_like(labels[rows, None], -1, dtype=x.dtype))
            d_head += d_logits[:, words].T @ x / n
            d_hidden[rows] = d_logits @ wide / n
    return Truth(expected=Outcome(value=total / n, gradients=(d_hidden[at], d_head)), gradients_at=(at, words))


def logprob_contests(setting: Setting) -> Iterator[Contest]:
    """Mean cross-entropy with gradients to states and head."""
    n = setting.sizes.rows
    for vocabulary, size in setting.sizes.policy_heads:
        hidden = setting.randn(n, size, seed=2).requires_grad_()
        head = setting.randn(vocabulary, size, scale=SCALE * size**-0.5, seed=1).requires_grad_()
        labels = sampled(hidden, head)
        truth = ce_truth(hidden, head, labels)
        entries = [
            _ce_entry("ours", lambda: _logprob_ce(setting), truth, hidden, head, labels, note=RECOMPUTED),
            _ce_entry("torch, eager", peers.eager_ce, truth, hidden, head, labels),
        ]
        if setting.peers:
            liger, cut = "Liger, fused_linear_cross_entropy", "cut-cross-entropy, linear_cross_entropy"
            entries += [
                _ce_entry(liger, peers.liger_ce, truth, hidden, head, labels),
                _ce_entry(cut, peers.cut_ce, truth, hidden, head, labels, note=FILTERED),
            ]
        entries.append(_ce_floor(hidden.detach(), head.detach()))
        yield Contest(
            kernel="logprob",
            case=f"N {n}, V {vocabulary}, H {size}, cross-entropy, gradients of states and head",
            entries=entries,
            tolerance=tolerance(setting),
            figures={"V": vocabulary, "H": size},
        )


def _logprob_ce(setting: Setting) -> peers.CeLoss:
    return lambda hidden, head, labels: -logprob(hidden, head, labels, backend=setting.backend).logprob.mean()


def _ce_entry(
    name: str,
    load: Callable[[], peers.CeLoss],
    truth: Truth,
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    note: str = "",
) -> Entry:
    def loaded() -> Call:
        loss_of = load()

        def call() -> Outcome:
            loss = loss_of(hidden, head, labels)
            return Outcome(value=loss, gradients=torch.autograd.grad(loss, (hidden, head)))

        return call

    kind: Literal["ours", "peer"] = "ours" if name == "ours" else "peer"
    return Entry(name=name, kind=kind, load=loaded, truth=truth, floor=THREE, note=note)


def _ce_floor(hidden: Tensor, head: Tensor) -> Entry:
    logits = hidden.new_empty(len(hidden), len(head))

    def call() -> None:
        torch.matmul(hidden, head.T, out=logits)
        torch.matmul(logits, head)
        torch.matmul(logits.T, hidden)

    return Entry(name=THREE, kind="floor", load=ready(call))
