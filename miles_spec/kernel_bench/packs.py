"""Contests of the kernels over a pack of segments: label shift and attention.

Invariant: what is moved and never computed with must be equal, bit for bit.

Dimensions: `T` packed tokens (under context parallelism this rank's), `S` segments, `D` depths (in attention the head
size), `H` hidden, `Hq`/`Hk` query/key heads, `R` rows that deeper depths of a chain run, `L` tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from miles_spec.kernel_bench import peers
from miles_spec.kernel_bench.contests import Contest, Entry, Outcome, Setting, Truth, ready
from miles_spec.kernel_bench.measure import Call
from miles_spec.kernels.attention import PackedAttention
from miles_spec.kernels.backend import Backend
from miles_spec.kernels.chain_attention import ChainAttention
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.shift import DraftTargets, draft_targets, extend, shift

EXACT = (0.0, 0.0)
VOCABULARY = 151936


def segment_lengths(tokens: int, segments: int) -> list[int]:
    """`[S]` random lengths of at least 1 that sum to `tokens`."""
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(segments))[: segments - 1] + 1
    return [end - start for start, end in pairwise([0, *sorted(cuts.tolist()), tokens])]


# shift


def shift_contests(setting: Setting) -> Iterator[Contest]:
    """All labels, masks and indices of a pack, and its hidden states `D` tokens ahead."""
    sizes = setting.sizes
    for count in sizes.segments:
        lengths = segment_lengths(sizes.pack, count)
        for depth in sizes.depths:
            layout = _layout(setting, lengths, depth)
            for what, entries_of in (("labels and masks", _target_entries), ("states and back", _state_entries)):
                yield Contest(
                    kernel="shift",
                    case=f"T {sizes.pack}, {count} segments, D {depth}, cp {layout.cp_size}, {what}",
                    entries=entries_of(setting, layout, depth),
                    tolerance=EXACT,
                    figures={"S": count, "D": depth, "cp": layout.cp_size},
                    count=True,
                )


def _layout(setting: Setting, lengths: Sequence[int], depth: int) -> PackedLayout:
    return PackedLayout.make(lengths, setting.device, halo=depth + 1, cp_group=setting.group)


def _target_entries(setting: Setting, layout: PackedLayout, depth: int) -> list[Entry]:
    whole = setting.tokens(sum(layout.lengths), VOCABULARY)
    sampled = torch.cat([torch.arange(n) >= n // 4 for n in layout.lengths]).to(setting.device)
    tokens, mask = layout.shard(whole), layout.shard(sampled)
    wanted = plain_targets(whole, sampled, layout, depth)
    inputs_at = wanted[-1, :, : layout.tokens].bool()

    def fields(targets: DraftTargets) -> Outcome:
        # under context parallelism `teacher` points into the extended rows: compare the tokens that it means
        teacher = extend(layout.source, layout)[targets.teacher]
        kept = [targets.inputs, targets.labels, targets.positions, teacher]
        values = [torch.where(targets.mask, x, -1) for x in kept]
        keys = targets.keys.expand_as(targets.mask).long()
        return Outcome(value=torch.stack([*values, keys, targets.mask.long()]))

    entries = [
        Entry(
            name="ours, draft_targets",
            kind="ours",
            load=ready(lambda: draft_targets(tokens, mask, layout, depth, backend=setting.backend)),
            view=fields,
            truth=Truth(expected=Outcome(value=wanted)),
        ),
        Entry(
            name="PackedLayout.make, once a batch",
            kind="scale",
            load=ready(lambda: _layout(setting, layout.lengths, depth)),
        ),
    ]
    offsets = [0, *accumulate(layout.padded)]
    loaders: dict[str, Callable[[], peers.Roll]] = {}
    if setting.peers:
        loaders["megatron-core, roll_tensor"] = lambda: peers.megatron_roll(offsets, setting.device, setting.group)
    if setting.group is None:
        loaders["torch.roll, segment by segment"] = lambda: peers.plain_roll(offsets)
    truth = Truth(expected=Outcome(value=wanted[0][inputs_at]), value_at=inputs_at)
    entries += [
        Entry(
            name=f"{name}, 4 fields",
            kind="peer",
            load=_rolls(load, (tokens, tokens, mask, layout.positions), depth),
            truth=truth,
        )
        for name, load in loaders.items()
    ]
    return entries


def _rolls(load: Callable[[], peers.Roll], fields: Sequence[Tensor], depth: int) -> Callable[[], Call]:
    """One token ahead per depth for every field, as multi-token prediction does it; gives the first field's."""

    def loaded() -> Call:
        roll = load()

        def call() -> Outcome:
            at, inputs = list(fields), []
            for _ in range(depth):
                at = [roll(x) for x in at]
                inputs.append(at[0])
            return Outcome(value=torch.stack(inputs))

        return call

    return loaded


def plain_targets(tokens: Tensor, sampled: Tensor, layout: PackedLayout, depth: int) -> Tensor:
    """`[6, D, T]` int64 from the whole pack: inputs, labels, positions and teachers of rows that count, else -1; keys;
    mask. Moved by a plain loop, then cut into this rank's rows."""
    roll = peers.plain_roll(layout.offsets)
    rows = torch.arange(len(tokens), device=tokens.device)
    start = torch.tensor(layout.offsets[:-1], device=tokens.device).repeat_interleave(
        torch.tensor(layout.lengths, device=tokens.device)
    )
    inside, good, token, row = roll(torch.ones_like(sampled)), roll(sampled), roll(tokens), roll(rows)
    keys, out = inside, []
    for d in range(depth):
        label = roll(token)
        sampled = roll(sampled)
        good = good & roll(sampled)
        values = [torch.where(good, x, -1) for x in (token, label, rows - start + d, row)]
        out.append(torch.stack([*values, keys.long(), good.long()], dim=1))
        token, row = label, roll(row)
    whole = torch.stack(out, dim=1)  # [tokens, D, 6]
    cut = torch.where(layout.real[:, None, None], whole[layout.source], torch.tensor([-1] * 4 + [0] * 2).to(whole))
    return cut.permute(2, 1, 0)


def _state_entries(setting: Setting, layout: PackedLayout, offset: int) -> list[Entry]:
    whole, whole_grad = (setting.randn(sum(layout.lengths), setting.sizes.hidden, seed=seed) for seed in (1, 2))

    def ahead(x: Tensor) -> Tensor:
        return torch.cat([F.pad(p[offset:], (0, 0, 0, min(offset, len(p)))) for p in x.split(layout.lengths)])

    behind = [F.pad(p[:-offset], (0, 0, min(offset, len(p)), 0)) for p in whole_grad.split(layout.lengths)]
    expected = Outcome(value=layout.shard(ahead(whole)), gradients=(layout.shard(torch.cat(behind)),))
    truth = Truth(expected=expected, gradients_at=(...,))
    x, grad = layout.shard(whole).requires_grad_(), layout.shard(whole_grad)

    def both_ways(move: Callable[[Tensor], Tensor]) -> Callable[[], Call]:
        def call() -> Outcome:
            out = move(x)
            return Outcome(value=out.detach(), gradients=torch.autograd.grad(out, x, grad))

        return ready(call)

    def ours(x: Tensor) -> Tensor:
        return shift(x, layout, offset, backend=setting.backend)

    floor = "floor, two copies"
    entries = [Entry(name="ours, shift", kind="ours", load=both_ways(ours), truth=truth, floor=floor)]
    if setting.group is None:
        name = "torch, segment by segment"
        entries.append(Entry(name=name, kind="peer", load=both_ways(ahead), truth=truth, floor=floor))
    entries.append(Entry(name=floor, kind="floor", load=ready(lambda: (x.detach().clone(), grad.clone()))))
    return entries


# chain attention


def attention_contests(setting: Setting) -> Iterator[Contest]:
    """The draft's unrolled attention, rows from a quarter of each segment on, gradients to all depths."""
    tokens, count = setting.sizes.attention
    query_heads, key_heads, size = setting.sizes.heads_of_attention
    layout = PackedLayout.make(segment_lengths(tokens, count), setting.device)
    starts = [p.row + (p.end - p.start) // 4 for p in layout.pieces]
    rows = len(ChainAttention(layout, starts, backend=setting.backend).rows)
    scale = size**-0.5
    heads = (query_heads, key_heads, key_heads)
    inputs, grads = [], []
    for depth in range(setting.sizes.chain):
        n = tokens if depth == 0 else rows
        # as a model's projections lie in memory
        inputs += [
            setting.randn(1, n, h, size, seed=10 * depth + i).transpose(1, 2).requires_grad_()
            for i, h in enumerate(heads)
        ]
        grads.append(setting.randn(1, n, query_heads, size, seed=10 * depth + 5).transpose(1, 2))

    def unrolled(backend: Backend) -> Call:
        def call() -> Outcome:
            chain = ChainAttention(layout, starts, backend=backend)
            outs = []
            for i in range(0, len(inputs), 3):
                query, key, value = inputs[i : i + 3]
                outs.append((chain.deeper if i else chain)(0, query, key, value, scale))
            gradients = torch.autograd.grad(outs, inputs, grads)
            return Outcome(value=torch.cat([o.detach() for o in outs], dim=2), gradients=gradients)

        return call

    def packed() -> tuple[Tensor, ...]:
        out = PackedAttention(layout, backend=setting.backend)(0, inputs[0], inputs[1], inputs[2], scale)
        return torch.autograd.grad(out, inputs[:3], grads[0])

    truth = chain_truth(inputs, grads, layout.lengths[0], starts[0], scale)
    entries = [Entry(name="ours, ChainAttention", kind="ours", load=ready(unrolled(setting.backend)), truth=truth)]
    if setting.peers:
        entries.append(
            Entry(name="dense scores, piece by piece", kind="peer", load=ready(unrolled("reference")), truth=truth)
        )
    entries.append(Entry(name="PackedAttention, depth 1 alone", kind="scale", load=ready(packed)))
    yield Contest(
        kernel="attention",
        case=f"T {tokens}, {count} segments, heads {query_heads}/{key_heads} of {size}, "
        f"{setting.sizes.chain} depths, {rows} rows deeper",
        entries=entries,
        tolerance=(1e-2, 2e-2) if setting.dtype == torch.bfloat16 else (1e-5, 1e-5),
    )


def chain_truth(inputs: Sequence[Tensor], grads: Sequence[Tensor], length: int, start: int, scale: float) -> Truth:
    """Outputs and gradients of the first segment, of `length` tokens, whose deeper depths run from `start` on; one
    dense softmax per depth, in float64."""
    sizes = [length if i == 0 else length - start for i in range(len(grads))]
    at = [(slice(None), slice(None), slice(sizes[i // 3])) for i in range(len(inputs))]
    wide = [x.detach()[a].double().requires_grad_() for x, a in zip(inputs, at, strict=True)]
    groups = wide[0].shape[1] // wide[1].shape[1]
    position = torch.arange(length, device=wide[0].device)
    chain: list[tuple[Tensor, Tensor]] = []
    outs = []
    for i in range(len(grads)):
        query = wide[3 * i]
        key, value = (x.repeat_interleave(groups, dim=1) for x in wide[3 * i + 1 : 3 * i + 3])
        if i == 0:
            base_key, base_value = key, value
        else:
            chain.append((key, value))
        visible = position <= position[length - sizes[i] :, None]
        scores = [(query @ base_key.mT).masked_fill(~visible, float("-inf"))]
        scores += [(query * k).sum(-1, keepdim=True) for k, _ in chain]
        weights = torch.softmax(torch.cat(scores, dim=-1) * scale, dim=-1)
        out = weights[..., :length] @ base_value
        for j, (_, v) in enumerate(chain):
            out = out + weights[..., length + j, None] * v
        outs.append(out)
    gradients = torch.autograd.grad(outs, wide, [g[:, :, :n].double() for g, n in zip(grads, sizes, strict=True)])
    begins = accumulate([0, *(g.shape[2] for g in grads[:-1])])
    index = torch.cat([torch.arange(b, b + n) for b, n in zip(begins, sizes, strict=True)]).to(position.device)
    return Truth(
        expected=Outcome(value=torch.cat(outs, dim=2).detach(), gradients=gradients),
        value_at=(slice(None), slice(None), index),
        gradients_at=tuple(at),
    )
