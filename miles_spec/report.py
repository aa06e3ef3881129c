"""`miles-spec report`: a run directory as one static HTML page.

Invariant: the page stands alone. It loads nothing, runs no script, and every text of the run's own is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miles_spec.plots import COLOURS, figures
from miles_spec.rundir import NAN, Run, column, first, last, number, read

SAMPLES_PER_STEP = 2
MODES = {"plain": "no speculation", "frozen": "frozen draft", "cotrained": "co-trained draft"}


def write(run_dir: Path) -> Path:
    """Writes `run_dir/report.html` and returns its path.

    Raises `ValueError` in one sentence that names the file if the run's metrics, or any other of its files, cannot be
    read.
    """
    out = run_dir / "report.html"
    out.write_text(page(read(run_dir)), encoding="utf-8")
    return out


def page(run: Run) -> str:
    """The whole page."""
    plots, left_out = figures(run)
    notes = [*run.notes]
    if left_out:
        notes.append(f"No plot for want of recorded values: {', '.join(left_out)}.")
    parts = [
        _head(run),
        _cards(run),
        "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes),
        f'<section class="plots">{"".join(plots)}</section>',
        _bench(run),
        _samples(run),
        _config(run),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(run.name)} · miles-spec</title>\n<style>{_style()}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _head(run: Run) -> str:
    facts = [f"{len(run.steps)} steps" if len(run.steps) > 1 else "1 step"]
    time_s = last(column(run.steps, "time_s"))
    if not math.isnan(time_s):
        facts.append(_duration(time_s))
    model = run.config.get("model", {}).get("path")
    if model:
        facts.append(f"model {model}")
    draft = run.config.get("draft", {})
    if draft.get("enabled") is False:
        facts.append("no draft")
    elif draft.get("path"):
        facts.append(f"draft {draft['path']}")
    elif "family" in draft:
        facts.append(f"{draft['family'].replace('auto', 'eagle')} draft")
    return f"<header><h1>{html.escape(run.name)}</h1><p>{html.escape(' · '.join(facts))}</p></header>"


def _cards(run: Run) -> str:
    figures_of = run.summary if run.summary is not None else _from_steps(run.steps)

    def get(name: str) -> float:
        return number(figures_of.get(name), f"summary.json: {name}")

    cards = []
    if not math.isnan(get("reward_last")):
        values = f"{_figure(get('reward_first'))} → {_figure(get('reward_last'))}"
        averaged = get("steps_averaged")
        steps = f"first to last {averaged:.0f} steps, mean" if averaged > 1 else "first to last step"
        cards.append(_card("Reward", values, steps))
    cotrained, frozen = get("accept_length_cotrained"), get("accept_length_frozen")
    if not math.isnan(cotrained):
        gain = "" if math.isnan(frozen) else f", {cotrained / frozen:.2f}&times;"
        values = f"{_coloured('cotrained', cotrained)} vs {_coloured('frozen', frozen)}"
        cards.append(_card("Accept length", values, f"co-trained vs frozen draft{gain}"))
    if not math.isnan(after := get("accept_length_after")):  # of `draft train`
        values = f"{_figure(get('accept_length_before'))} → {_figure(after)}"
        cards.append(_card("Accept length", values, "before and after training, on held-out responses"))
    speed, plain = get("tokens_per_s_speculative"), get("tokens_per_s_plain")
    if not math.isnan(speed):
        values, what = _coloured("cotrained", speed), "with speculation"
        if not math.isnan(plain):
            values, what = f"{values} vs {_coloured('plain', plain)}", "with vs without speculation, by the cost model"
        cards.append(_card("Rollout tokens/s", values, what))
    if not math.isnan(get("net_speedup")):
        error = get("net_speedup_error")
        stated = "" if math.isnan(error) else f", whose error is {abs(error):.1%}"
        cards.append(_card("Net speed-up", f"{get('net_speedup'):.2f}&times;", f"measured over the cost model{stated}"))
    verified, failed = get("receipts_verified"), get("receipts_failed")
    if not math.isnan(verified):
        bad = 0 if math.isnan(failed) else int(failed)
        note = f'<strong class="bad">{bad} failed</strong>' if bad else "weight pushes verified, 0 failed"
        cards.append(_card("Receipts", f"{int(verified)}", note))
    return f'<section class="cards">{"".join(cards)}</section>' if cards else ""


def _from_steps(steps: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
    """What stands in for `summary.json` while a run goes on; the page says so."""
    reward = column(steps, "reward_mean")
    names = {
        "accept_length_cotrained": "accept_length_cotrained",
        "accept_length_frozen": "accept_length_frozen",
        "tokens_per_s_speculative": "tokens_per_s",
        "tokens_per_s_plain": "tokens_per_s_plain",
        "net_speedup": "net_speedup",
        "net_speedup_error": "net_speedup_error",
    }
    figures_of = {key: last(column(steps, name)) for key, name in names.items()}
    for name in ("receipts_verified", "receipts_failed"):
        counts = [v for v in column(steps, name) if v == v]
        figures_of[name] = sum(counts) if counts else NAN
    return {"reward_first": first(reward), "reward_last": last(reward), **figures_of}


def _card(label: str, value: str, note: str) -> str:
    """`value` and `note` are HTML."""
    return f'<div class="card"><h2>{label}</h2><p class="value">{value}</p><p>{note}</p></div>'


def _coloured(colour: str, value: float) -> str:
    return f'<span style="color:var(--{colour})">{_figure(value)}</span>'


def _bench(run: Run) -> str:
    if not run.bench:
        return ""
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in run.bench)]
    cells = {(row["batch"], row["mode"]): row for row in run.bench}
    # no speculation accepts nothing and is the 1.00 of the others' speed-up
    fields = [("tokens_per_s", "tokens/s"), ("accept_length", "accept length"), ("speedup", "speed-up")]
    columns = [(mode, *field) for mode in modes for field in (fields[:1] if mode == "plain" else fields)]
    groups = "".join(
        f'<th colspan="{sum(m == mode for m, _, _ in columns)}" style="color:var(--{mode})">{MODES[mode]}</th>'
        for mode in modes
    )
    heads = "".join(f"<th>{label}</th>" for _, _, label in columns)
    rows = []
    for batch in sorted({row["batch"] for row in run.bench}):
        values = [number(cells.get((batch, mode), {}).get(name), f"bench.json: {name}") for mode, name, _ in columns]
        row = "".join(f"<td>{_figure(value)}</td>" for value in values)
        rows.append(f"<tr><th>{int(batch)}</th>{row}</tr>")
    return (
        "<section><h2>Rollout benchmark</h2><p>The same prompts and seeds, decoded by one engine in each mode; "
        "speed-up is over no speculation at the same batch size, both measured.</p>"
        f'<div class="scroll"><table><thead><tr><th rowspan="2">batch</th>{groups}</tr><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _samples(run: Run) -> str:
    if not run.samples:
        return ""
    steps = [sample["step"] for sample in run.samples]
    chosen = []
    for step in dict.fromkeys((min(steps), max(steps))):
        chosen.append(f"<h3>Step {int(step)}</h3>")
        chosen += [_sample(s) for s in run.samples if s["step"] == step][:SAMPLES_PER_STEP]
    return (
        "<section><h2>Samples</h2><p>The first ones kept in the first and in the last step, token by token: "
        '<span class="text"><mark>drafted and accepted</mark>, sampled by the policy</span>.</p>'
        f"{''.join(chosen)}</section>"
    )


def _sample(sample: Mapping[str, Any]) -> str:
    # empty where the engine does not tell which tokens were drafted
    accepted = [bool(flag) for flag in sample["accepted"]]
    reward = number(sample["reward"], "samples.jsonl: reward")
    facts = [f"reward {_figure(reward)}", f"ended by {sample['finish']}"]
    if accepted:
        facts.append(f"{sum(accepted)} of {len(accepted)} tokens accepted")
    marks = accepted or [False] * len(sample["pieces"])
    body = "".join(_piece(piece, flag) for piece, flag in zip(sample["pieces"], marks, strict=True))
    return (
        f'<article><p class="facts">{html.escape(" · ".join(facts))} <small>{html.escape(str(sample["prompt_id"]))}'
        f'</small></p><pre class="prompt">{html.escape(sample["prompt"])}</pre><pre class="text">{body}</pre></article>'
    )


def _piece(piece: str, accepted: bool) -> str:
    text = html.escape(piece).replace("\n", '<i class="nl"></i>\n').replace("\t", '<i class="tab"></i>\t')
    return f"<mark>{text}</mark>" if accepted else f"<span>{text}</span>"


def _config(run: Run) -> str:
    if not run.config_text:
        return '<p class="note">The run directory holds no config.toml.</p>'
    text = html.escape(run.config_text.strip())
    return f"<details><summary>Configuration</summary><pre>{text}</pre></details>"


def _figure(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {s} s" if minutes else f"{s} s"


def _style() -> str:
    light = ";".join(f"--{name}:{pair[0]}" for name, pair in COLOURS.items())
    dark = ";".join(f"--{name}:{pair[1]}" for name, pair in COLOURS.items())
    # a printer gets the light theme: the dark one is for screens only
    return f"""
:root{{{light};--ink:#1b1f24;--page:#fff;--panel:#f6f7f9;--tint:#cfe0ff;--bad:#c62828}}
@media screen and (prefers-color-scheme:dark){{:root{{{dark};
--ink:#e6e8eb;--page:#14171c;--panel:#1c2027;--tint:#233f73;--bad:#ff7b72}}}}
{CSS}"""


CSS = """*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 3rem;max-width:72rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;margin:0;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:2rem 0 .3rem}
h3{font-size:1rem;margin:0 0 .2rem}small{color:var(--muted);font-weight:400}
header p,section>p,figcaption,.card p,.facts{color:var(--muted);margin:.1rem 0;font-size:.9rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.75rem;margin:1.2rem 0}
.card{background:var(--panel);border-radius:.6rem;padding:.7rem .9rem}
.card h2{font-size:.85rem;font-weight:600;margin:0;color:var(--muted)}
.card .value{font-size:1.45rem;font-weight:650;color:var(--ink);font-variant-numeric:tabular-nums}
.bad{color:var(--bad)}
.note{border-left:3px solid var(--frozen);padding:.2rem .8rem;margin:.6rem 0;font-size:.92rem}
.plots{display:grid;margin-top:1.6rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));
gap:1.8rem 2rem}
figure{margin:0;break-inside:avoid;display:flex;flex-direction:column}
figure>svg{width:100%;height:auto;margin:.2rem 0;overflow:visible}
figure>svg *{stroke-linejoin:round}figure>svg text{font-family:inherit!important}
.keys{display:flex;flex-wrap:wrap;gap:0 1rem;margin:0;font-size:.85rem}
.keys b{font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
table{border-collapse:collapse;margin-top:.6rem;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{padding:.3rem .8rem;text-align:right;border-bottom:1px solid var(--rule)}
thead th{font-weight:600;white-space:nowrap}
article{margin:0 0 1.2rem;break-inside:avoid-page}section>h3{margin:1.2rem 0 .4rem}
.facts small{float:right;overflow-wrap:anywhere}
pre{margin:.3rem 0;padding:.7rem .9rem;background:var(--panel);border-radius:.5rem;white-space:pre-wrap;
overflow-wrap:anywhere;font:.85rem/1.65 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
.prompt{max-height:12em;overflow-y:auto;color:var(--muted)}
mark{background:var(--tint);color:inherit;border-radius:.2rem;padding:.1em 0;margin-right:1px;
border-bottom:2px solid var(--cotrained);print-color-adjust:exact;-webkit-print-color-adjust:exact}
.nl::before{content:"↵";color:var(--muted);font-style:normal}.tab::before{content:"⇥";color:var(--muted);font-style:normal}
details{margin-top:2rem}summary{font-size:1.2rem;font-weight:600;cursor:pointer}
@media (max-width:30rem){.card .value{font-size:1.15rem}}
@media print{body{max-width:none;padding:0;font-size:11pt}.prompt{max-height:none}
.plots{grid-template-columns:1fr 1fr}.scroll{overflow:visible;break-inside:avoid}th,td{padding:.2rem .4rem}
h2,h3{break-after:avoid}.card,pre{border:1px solid var(--rule)}
details::details-content{content-visibility:visible;block-size:auto}}
"""
