"""Each draft family as it was published, in float64, from the tensors of a checkpoint and plain numbers.

Row `t` joins a state of position `t` with the embedding of token `t + 1`, at rotary position `t`, and guesses token
`t + 2`. A block that starts at row `r` runs rows `0..r` on the target's states, then a row more for each depth, on
what the row before it hands on. Every row attends to itself and to all before it.

With a layer for each depth, row `t` of depth `d` joins the state of row `t` at depth `d - 1` with token `t + d`, and
attends to the rows of its own depth.

Sources: EAGLE, arXiv 2401.15077, section 3.1; EAGLE-3, arXiv 2503.01840, section 3; DeepSeek-V3, arXiv 2412.19437,
equations 12 to 16 (experts) and 21 to 23; MiMo, arXiv 2505.07608, section 2; rotary embedding, arXiv 2104.09864; and
for norms, biases, orders and names the code that serves their checkpoints.

Dimensions: `n` rows, `L` tokens, `H` hidden, `V` vocabulary, `D` depths, `E` experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What a checkpoint's tensors do not say."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    rotated: int
    """How many of a head's first dimensions are rotated."""
    scaling: Mapping[str, float] | None = None
    """Of Llama 3's rotary frequencies: `factor`, `low_freq_factor`, `high_freq_factor`, `original_tokens`."""
    one_plus: bool = False
    """Whether norms multiply by one plus their weight."""
    gelu: bool = False
    """Whether the gate goes through GELU (its tanh form) in place of SiLU."""
    chosen: int = 0
    """Experts of each row, whose weights are made to sum to `routed_scale`."""
    groups: tuple[int, int] = (1, 1)
    """How many groups of experts there are, and from how many of them those of a row may come."""
    routed_scale: float = 1.0

    @classmethod
    def of(cls, config: Any) -> Numbers:
        """What a draft's own configuration says, and the target's norms where it has them."""
        rope, kind = config.rope_parameters, config.model_type
        llama3 = rope["rope_type"] == "llama3"
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        names = ("factor", "low_freq_factor", "high_freq_factor")
        return cls(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=size,
            rotated=int(size * rope.get("partial_rotary_factor", 1)),
            eps=config.rms_norm_eps,
            theta=rope["rope_theta"],
            scaling={
                **{name: rope[name] for name in names},
                "original_tokens": rope["original_max_position_embeddings"],
            }
            if llama3
            else None,
            one_plus=kind in ("gemma", "qwen3_next"),
            gelu=kind == "gemma",
            chosen=getattr(config, "num_experts_per_tok", 0),
            groups=(getattr(config, "n_group", 1), getattr(config, "topk_group", 1)),
            routed_scale=getattr(config, "routed_scaling_factor", 1.0),
        )


def block(
    family: str,
    tensors: Tensors,
    numbers: Numbers,
    embedding: Tensor,
    read: Tensor,
    tokens: Tensor,
    row: int,
    depth: int,
    layers: int = 1,
) -> list[Tensor]:
    """`depth` states `[H]` that the LM head turns into logits, of the block that starts at `row`; differentiable in
    `tensors`.

    `embedding` `[V, H]`; `read` `[L, H]` or `[L, 3H]`, the target's states that the family reads; `tokens` `[L]`, all
    confirmed; `layers`, how many depths have one of their own.
    """
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    hidden = read.double()[: row + 1]
    if family == "eagle3":
        hidden = linear(weights, "fc", hidden)
    outs = []
    for d in range(1, depth + 1):
        at = min(d, layers)
        embeds = embedding.detach().double()[tokens[at : row + d + 1]]
        following, out = FAMILIES[family](weights, numbers, embeds, hidden, at - 1)
        outs.append(out[-1])
        hidden = following if d < layers else torch.cat([hidden, following[-1:]])
    return outs


def eagle(w: Tensors, numbers: Numbers, embeds: Tensor, hidden: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """`[n, H]` twice, as for all families: for the next depth, and for the LM head. `number` is that of the layer."""
    x = linear(w, "fc", torch.cat([embeds, hidden], -1))
    x = x + attention(w, "layers.0.self_attn", numbers, x)
    x = x + gated(w, "layers.0.mlp", numbers, norm(w, "layers.0.post_attention_layernorm", numbers, x))
    return x, x


def eagle3(w: Tensors, numbers: Numbers, embeds: Tensor, hidden: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """`hidden` at depth 1 is after `fc`."""
    both = [norm(w, "midlayer.input_layernorm", numbers, embeds), norm(w, "midlayer.hidden_norm", numbers, hidden)]
    x = hidden + attention(w, "midlayer.self_attn", numbers, torch.cat(both, -1))
    x = x + gated(w, "midlayer.mlp", numbers, norm(w, "midlayer.post_attention_layernorm", numbers, x))
    return x, norm(w, "norm", numbers, x)


def nextn(w: Tensors, numbers: Numbers, embeds: Tensor, hidden: Tensor, number: int) -> tuple[Tensor, Tensor]:
    at = f"model.layers.{number}"
    both = [norm(w, f"{at}.enorm", numbers, embeds), norm(w, f"{at}.hnorm", numbers, hidden)]
    x = decoder_layer(w, at, numbers, linear(w, f"{at}.eh_proj", torch.cat(both, -1)))
    out = norm(w, f"{at}.shared_head.norm", numbers, x)
    return out, out


def mimo(w: Tensors, numbers: Numbers, embeds: Tensor, hidden: Tensor, number: int) -> tuple[Tensor, Tensor]:
    at = f"model.mtp_layers.{number}"
    if number == 0:
        embeds = torch.cat([torch.zeros_like(embeds[:1]), embeds[1:]])
    both = [norm(w, f"{at}.hidden_layernorm", numbers, hidden), norm(w, f"{at}.token_layernorm", numbers, embeds)]
    x = decoder_layer(w, at, numbers, linear(w, f"{at}.input_proj", torch.cat(both, -1)))
    out = norm(w, f"{at}.final_layernorm", numbers, x)
    return out, out


def qwen_mtp(w: Tensors, numbers: Numbers, embeds: Tensor, hidden: Tensor, number: int) -> tuple[Tensor, Tensor]:
    both = [
        norm(w, "mtp.pre_fc_norm_embedding", numbers, embeds),
        norm(w, "mtp.pre_fc_norm_hidden", numbers, hidden),
    ]
    x = decoder_layer(w, "mtp.layers.0", numbers, linear(w, "mtp.fc", torch.cat(both, -1)))
    out = norm(w, "mtp.norm", numbers, x)
    return out, out


FAMILIES: dict[str, Callable[[Tensors, Numbers, Tensor, Tensor, int], tuple[Tensor, Tensor]]] = {
    "eagle": eagle,
    "eagle3": eagle3,
    "nextn": nextn,
    "mimo": mimo,
    "qwen_mtp": qwen_mtp,
}


def decoder_layer(w: Tensors, at: str, numbers: Numbers, x: Tensor) -> Tensor:
    x = x + attention(w, f"{at}.self_attn", numbers, norm(w, f"{at}.input_layernorm", numbers, x))
    return x + gated(w, f"{at}.mlp", numbers, norm(w, f"{at}.post_attention_layernorm", numbers, x))


def attention(w: Tensors, at: str, numbers: Numbers, x: Tensor) -> Tensor:
    """Causal, of all `n` rows, head by head."""
    n, size = len(x), numbers.head_dim
    query, key, value = (linear(w, f"{at}.{name}_proj", x).view(n, -1, size) for name in "qkv")
    gates = None
    if query.shape[1] == 2 * numbers.heads:
        # Qwen3-Next: each head's query, then what its output is let through by
        query, gates = query[:, 0::2], torch.sigmoid(query[:, 1::2])
    if f"{at}.q_norm.weight" in w:
        query, key = norm(w, f"{at}.q_norm", numbers, query), norm(w, f"{at}.k_norm", numbers, key)
    unseen = torch.ones(n, n, dtype=torch.bool).triu(1)
    outs = []
    for head in range(numbers.heads):
        shared = head * numbers.kv_heads // numbers.heads
        scores = rotate(query[:, head], numbers) @ rotate(key[:, shared], numbers).T / math.sqrt(size)
        out = torch.softmax(scores.masked_fill(unseen, -math.inf), -1) @ value[:, shared]
        outs.append(out if gates is None else out * gates[:, head])
    return linear(w, f"{at}.o_proj", torch.cat(outs, -1))


def rotate(x: Tensor, numbers: Numbers) -> Tensor:
    """`[n, head_dim]` at positions `0..n-1`: dimension `i` of the rotated ones pairs with `i + rotated / 2`."""
    half = numbers.rotated // 2
    x = x.clone()
    for i in range(half):
        frequency = numbers.theta ** (-i / half)
        if numbers.scaling is not None:
            frequency = llama3(frequency, **numbers.scaling)
        angle = torch.arange(len(x), dtype=torch.float64) * frequency
        a, b = x[:, i].clone(), x[:, i + half].clone()
        x[:, i], x[:, i + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return x


def llama3(
    frequency: float, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_tokens: float
) -> float:
    """Low frequencies divided by `factor`, high ones as they are, those between on the line between the two."""
    turns = original_tokens * frequency / (2 * math.pi)
    if turns < low_freq_factor:
        return frequency / factor
    if turns > high_freq_factor:
        return frequency
    share = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return (1 - share) * frequency / factor + share * frequency


def gated(w: Tensors, at: str, numbers: Numbers, x: Tensor) -> Tensor:
    if f"{at}.gate.weight" in w:
        return experts(w, at, numbers, x)
    gate = linear(w, f"{at}.gate_proj", x)
    gate = torch.nn.functional.gelu(gate, approximate="tanh") if numbers.gelu else gate * torch.sigmoid(gate)
    return linear(w, f"{at}.down_proj", gate * linear(w, f"{at}.up_proj", x))


def experts(w: Tensors, at: str, numbers: Numbers, x: Tensor) -> Tensor:
    """Row by row."""
    logits = linear(w, f"{at}.gate", x)
    bias = w.get(f"{at}.gate.e_score_correction_bias")
    scores = torch.softmax(logits, -1) if bias is None else torch.sigmoid(logits)
    rows = []
    for row, score in zip(x, scores, strict=True):
        # the bias has a say in who is chosen, none in how much
        liking = (score if bias is None else score + bias).tolist()
        size = len(liking) // numbers.groups[0]
        groups = [range(start, start + size) for start in range(0, len(liking), size)]
        groups.sort(key=lambda group: -sum(sorted(liking[e] for e in group)[-2:]))
        open_to = [e for group in groups[: numbers.groups[1]] for e in group]
        chosen = sorted(open_to, key=lambda e: -liking[e])[: numbers.chosen]
        whole = sum(score[e] for e in chosen) / numbers.routed_scale
        rows.append(sum(score[e] / whole * gated(w, f"{at}.experts.{e}", numbers, row) for e in chosen))
    out = torch.stack(rows)  # type: ignore[arg-type]
    if f"{at}.shared_experts.up_proj.weight" in w:
        out = out + gated(w, f"{at}.shared_experts", numbers, x)
    if f"{at}.shared_expert.up_proj.weight" in w:
        share = torch.sigmoid(linear(w, f"{at}.shared_expert_gate", x))
        out = out + share * gated(w, f"{at}.shared_expert", numbers, x)
    return out


def norm(w: Tensors, at: str, numbers: Numbers, x: Tensor) -> Tensor:
    factor = w[f"{at}.weight"] + (1 if numbers.one_plus else 0)
    return x / (x.square().mean(-1, keepdim=True) + numbers.eps).sqrt() * factor


def linear(w: Tensors, at: str, x: Tensor) -> Tensor:
    out = x @ w[f"{at}.weight"].T
    return out + w[f"{at}.bias"] if f"{at}.bias" in w else out
