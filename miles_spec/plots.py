"""The report's plots: metrics to inline SVG that follows the page's light or dark theme.

Invariant: in every plot a colour means the same thing, a solid line was measured and a dashed one was estimated. A
missing value is a gap, never a zero and never a line drawn across.

Colours are drawn in their light-theme hex form and then replaced by CSS variables of the same name.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miles_spec.rundir import NAN, Run, column, last, list_column

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_PT, HEIGHT_PT = 440, 230
ROLLOUT_KL_GOAL = 0.01
COLOURS: Mapping[str, tuple[str, str]] = {
    "cotrained": ("#2563d9", "#7aa7ff"),
    "frozen": ("#d97a16", "#ffad57"),
    "plain": ("#7b828c", "#a3abb6"),
    "policy": ("#0c857c", "#43c7bb"),
    "muted": ("#5f6773", "#9aa3af"),
    "rule": ("#dfe2e7", "#2f353e"),
    "s1": ("#7b3fc4", "#b98cf5"),
    "s2": ("#c23f8f", "#f088c4"),
    "s3": ("#d4594f", "#ff938a"),
    "s4": ("#bf8a1b", "#e3b655"),
    "s5": ("#7c962b", "#b3cc66"),
    "s6": ("#3d9960", "#77cf98"),
    "s7": ("#3c8fb0", "#79c4e2"),
    "s8": ("#8a6a55", "#c4a48e"),
}
"""CSS variable to its hex colour in the light and in the dark theme; `s1` to `s8` are for positions and phases."""
SERIES = tuple(name for name in COLOURS if re.fullmatch(r"s\d", name))
STACK = tuple(SERIES[i * 3 % len(SERIES)] for i in range(len(SERIES)))
"""The same, with neighbours far apart."""
PHASES = ("rollout", "reward", "train", "draft", "memory", "sync", "checkpoint")
ENGINE_PARTS = ("prefill", "draft", "verify", "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One entry of a legend."""

    label: str
    colour: str
    """A name in `COLOURS`."""
    mark: str
    """`solid`, `dashed` or `area`."""
    value: float = NAN
    """The last value, shown beside the label; NaN for none."""


class Chart:
    """Draws one plot of a run and collects its legend and its caption."""

    def __init__(self, run: Run, axes: Axes, lines: Sequence[Mapping[str, Any]], x_name: str) -> None:
        self.run = run
        self.axes = axes
        self.lines = lines
        self.x = column(lines, x_name)
        self.keys: list[Key] = []
        self.remark = ""
        """A sentence about this run, after the caption."""

    def column(self, name: str) -> list[float]:
        return column(self.lines, name)

    def line(self, y: Sequence[float], label: str, colour: str, *, dashed: bool = False, width: float = 1.8) -> bool:
        """One series, with a dot where neither neighbour exists; False if it has no value at all."""
        if math.isnan(last(y)):
            return False
        hex_colour, style = COLOURS[colour][0], "--" if dashed else "-"
        self.axes.plot(self.x, y, style, color=hex_colour, linewidth=width, zorder=3)
        padded = [NAN, *y, NAN]
        alone = [i for i, v in enumerate(y) if v == v and math.isnan(padded[i]) and math.isnan(padded[i + 2])]
        self.axes.plot([self.x[i] for i in alone], [y[i] for i in alone], "o", color=hex_colour, markersize=4, zorder=3)
        self.keys.append(Key(label=label, colour=colour, mark="dashed" if dashed else "solid", value=last(y)))
        return True

    def band(self, y: Sequence[float], half: Sequence[float], label: str, colour: str) -> None:
        """A tinted band `y - half .. y + half`."""
        if all(math.isnan(a + b) for a, b in zip(y, half, strict=True)):
            return
        if len(self.x) == 1:
            self.axes.errorbar(self.x, y, yerr=half, fmt="none", ecolor=COLOURS[colour][0], alpha=0.4, linewidth=6)
        else:
            low = [a - b for a, b in zip(y, half, strict=True)]
            high = [a + b for a, b in zip(y, half, strict=True)]
            self.axes.fill_between(self.x, low, high, color=COLOURS[colour][0], alpha=0.16, linewidth=0)
        self.keys.append(Key(label=label, colour=colour, mark="area"))

    def stack(self, names: Sequence[tuple[str, str]]) -> None:
        """Metrics in seconds on top of each other, one column per step; a phase without a value is left out."""
        edges = [self.x[0] - 0.5, *((a + b) / 2 for a, b in zip(self.x, self.x[1:], strict=False)), self.x[-1] + 0.5]
        base = [0.0] * len(self.x)
        for i, (name, label) in enumerate(names):
            y = self.column(name)
            if math.isnan(last(y)):
                continue
            top = [b + (0.0 if math.isnan(v) else v) for b, v in zip(base, y, strict=True)]
            colour = STACK[i]
            steps = ([*base, base[-1]], [*top, top[-1]])
            self.axes.fill_between(edges, *steps, step="post", color=COLOURS[colour][0], linewidth=0, alpha=0.85)
            self.keys.append(Key(label=label, colour=colour, mark="area", value=last(y)))
            base = top
        self.axes.set_ylim(bottom=0)

    def rule(self, y: float) -> None:
        """A thin horizontal line to compare with."""
        self.axes.axhline(y, color=COLOURS["muted"][0], linewidth=1, linestyle=":", zorder=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One plot of the report."""

    slug: str
    title: str
    unit: str
    caption: str
    """What it shows, what good looks like and how it was measured."""
    draw: Callable[[Chart], None]
    """Fills a chart; a chart left without keys is left out of the report."""
    warmup: bool = False
    """Whether it shows the lines of the warm start."""


def _reward(chart: Chart) -> None:
    mean = chart.column("reward_mean")
    if chart.line(mean, "mean", "policy"):
        chart.band(mean, chart.column("reward_std"), "± 1 standard deviation", "policy")


def _accept_length(chart: Chart) -> None:
    chart.line(chart.column("accept_length"), "engine's count", "cotrained")
    chart.line(chart.column("accept_length_cotrained"), "estimate, co-trained", "cotrained", dashed=True, width=1.2)
    chart.line(chart.column("accept_length_frozen"), "estimate, frozen", "frozen", dashed=True)
    error = chart.column("accept_estimate_error")
    if not math.isnan(last(error)):
        worst = max(abs(e) for e in error if e == e)
        chart.remark = (
            f"In this run the co-trained estimate differed from the count by {last(error):+.2f} in the last step, and "
            f"by at most {worst:.2f} in any."
        )


def _accept_rate(chart: Chart) -> None:
    for i, y in enumerate(list_column(chart.lines, "accept_rate_by_position")):
        chart.line(y, f"position {i + 1}", SERIES[i % len(SERIES)])
    chart.axes.set_ylim(0, 1)


def _tokens_per_s(chart: Chart) -> None:
    chart.line(chart.column("tokens_per_s"), "measured", "cotrained")
    chart.line(chart.column("tokens_per_s_plain"), "without speculation, by the cost model", "plain", dashed=True)
    chart.axes.set_ylim(bottom=0)


def _net_speedup(chart: Chart) -> None:
    speedup = chart.column("net_speedup")
    error = chart.column("net_speedup_error")
    if chart.line(speedup, "net speed-up", "cotrained"):
        half = [s * abs(e) for s, e in zip(speedup, error, strict=True)]
        chart.band(speedup, half, "error of the cost model", "cotrained")
        chart.rule(1.0)


def _draft_loss(chart: Chart) -> None:
    chart.line(chart.column("draft_loss"), "as trained", "cotrained", width=2.2)
    depths = list_column(chart.lines, "draft_loss_by_depth")
    for i, y in enumerate(depths if len(depths) > 1 else []):
        chart.line(y, f"depth {i + 1}", SERIES[i % len(SERIES)], width=1.2)


def _rollout_kl(chart: Chart) -> None:
    kl = chart.column("rollout_kl")
    chart.line(kl, "mean KL", "policy")
    if all(v > 0 for v in kl if v == v):
        from matplotlib.ticker import LogLocator

        # a logarithmic axis has no place for the exact zeros of a batch-invariant run
        chart.axes.set_yscale("log")
        chart.axes.yaxis.set_major_locator(LogLocator(numticks=6))
        chart.axes.yaxis.set_minor_locator(LogLocator(subs=()))
        chart.rule(ROLLOUT_KL_GOAL)


def _seconds(chart: Chart) -> None:
    chart.stack([(f"seconds_{phase}", phase) for phase in PHASES])


def _engine_seconds(chart: Chart) -> None:
    chart.stack([(f"rollout_seconds_{part}", part) for part in ENGINE_PARTS])


PLOTS = (
    Plot(
        slug="reward",
        title="Reward",
        unit="per sample",
        caption="Mean reward of the samples each step trained on. Good is a rise that levels off; flat from the start "
        "means that the task is too hard or too easy, or the learning rate too small.",
        draw=_reward,
    ),
    Plot(
        slug="accept-length",
        title="Accept length",
        unit="tokens per verify step",
        caption="What the engine counted (solid), and what the draft it served and the draft of step 1 would give on "
        "the same responses (dashed, from the trainer's own probabilities). Good is an estimate that stays on the "
        "count, and a frozen draft that falls behind.",
        draw=_accept_length,
    ),
    Plot(
        slug="accept-rate",
        title="Acceptance by position",
        unit="accepted / drafted",
        caption="Of the tokens drafted at each position of a block, the share that became part of a response, from the "
        "engine's counts over the step. Good is high and rising; a last position near zero is drafted in vain.",
        draw=_accept_rate,
    ),
    Plot(
        slug="tokens-per-s",
        title="Rollout speed",
        unit="tokens/s",
        caption="Response tokens over the time of the rollout as measured (solid), and what the same engine's "
        "calibrated cost model gives for the same work without speculation (dashed). Good is solid above dashed.",
        draw=_tokens_per_s,
    ),
    Plot(
        slug="net-speedup",
        title="Net speed-up",
        unit="with / without speculation",
        caption="Measured tokens/s over the cost model's tokens/s without speculation, within the model's error as "
        "calibrated. Good is above the dotted line at 1; below it, speculation costs more than it brings.",
        draw=_net_speedup,
    ),
    Plot(
        slug="draft-loss",
        title="Draft loss",
        unit="nats while KL or CE",
        caption="The draft's training loss over all rows of the step, as trained and by depth. Good is a fall and then "
        "a level that holds while the policy moves; a loss that ramps from KL to TV changes its scale on the way.",
        draw=_draft_loss,
    ),
    Plot(
        slug="warm-start",
        title="Warm start of the draft",
        unit="draft loss by warm-up step",
        caption="The draft's loss in the steps that trained it alone, on the policy's own rollouts, before step 1. "
        "Good is a fall that has slowed down by the end.",
        draw=_draft_loss,
        warmup=True,
    ),
    Plot(
        slug="rollout-kl",
        title="Train / rollout KL",
        unit="nats per token",
        caption="How far the trainer's log-probabilities are from the engine's on the sampled tokens (k3 estimate, "
        f"pooled over the step). Good is below {ROLLOUT_KL_GOAL:g} (dotted where the scale is logarithmic), and 0 in "
        "batch-invariant mode.",
        draw=_rollout_kl,
    ),
    Plot(
        slug="seconds",
        title="Time by phase",
        unit="seconds per step",
        caption="Wall time of each phase, on top of each other. Good is a rollout that shrinks beside the rest, and a "
        "draft that takes at most 5% of the training time.",
        draw=_seconds,
    ),
    Plot(
        slug="engine-seconds",
        title="Time within the rollout",
        unit="seconds per step",
        caption="Where the engine's own clock says its time went: prefill, drafting, target forwards of decoding, and "
        "the rest. Good is little drafting beside verifying.",
        draw=_engine_seconds,
    ),
)


def figures(run: Run) -> tuple[list[str], list[str]]:
    """Every plot the run has values for, as HTML `<figure>`s, and the titles of those it has none for."""
    drawn, left_out = [], []
    for plot in PLOTS:
        if plot.warmup and not run.warmup:
            continue
        if figure := _figure(run, plot):
            drawn.append(figure)
        else:
            left_out.append(plot.title)
    return drawn, left_out


def _figure(run: Run, plot: Plot) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": plot.slug,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 11,
        "path.simplify_threshold": 0.5,
    }
    lines, x_name = (run.warmup, "warmup_step") if plot.warmup else (run.steps, "step")
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH_PT / 72, HEIGHT_PT / 72), layout="constrained")
        axes = figure.subplots()
        chart = Chart(run, axes, lines, x_name)
        plot.draw(chart)
        if not chart.keys:
            return ""
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.spines["bottom"].set_color(COLOURS["muted"][0])
        axes.grid(axis="y", color=COLOURS["rule"][0], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=COLOURS["muted"][0], length=0, pad=5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.set_xlabel("step", color=COLOURS["muted"][0], loc="right")
        if len(chart.x) == 1:
            axes.set_xlim(chart.x[0] - 1, chart.x[0] + 1)
            axes.set_xticks(chart.x)
        else:
            axes.margins(x=0.01)
        if axes.get_yscale() == "log":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
            axes.ticklabel_format(axis="y", useOffset=False, style="plain")
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    caption = f"{plot.caption} {chart.remark}".strip()
    legend = "".join(_legend(key) for key in chart.keys)
    return (
        f'<figure id="{plot.slug}"><h3>{html.escape(plot.title)} <small>{html.escape(plot.unit)}</small></h3>'
        f'<p class="keys">{legend}</p>{_inline(out.getvalue(), plot)}'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _legend(key: Key) -> str:
    if key.mark == "area":
        shape = f'<rect width="14" height="10" rx="2" fill="var(--{key.colour})" fill-opacity="0.6"/>'
    else:
        dash = ' stroke-dasharray="5 3"' if key.mark == "dashed" else ""
        shape = f'<path d="M0 5H22" stroke="var(--{key.colour})" stroke-width="2.5"{dash}/>'
    width = 14 if key.mark == "area" else 22
    value = "" if math.isnan(key.value) else f" <b>{key.value:.3g}</b>"
    swatch = f'<svg width="{width}" height="10" aria-hidden="true">{shape}</svg>'
    return f"<span>{swatch} {html.escape(key.label)}{value}</span>"


def _inline(svg: str, plot: Plot) -> str:
    """Matplotlib's SVG as an element of the page: no header or style of its own, ids that are unique in the page,
    colours as CSS variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    head = f'<svg viewBox="0 0 {WIDTH_PT} {HEIGHT_PT}" role="img" aria-label="{plot.title}">'
    svg = re.sub(r"<svg [^>]*>", head, svg)
    svg = re.sub(r'\bid="', f'id="{plot.slug}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{plot.slug}-', svg).replace("url(#", f"url(#{plot.slug}-")
    for name, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    return re.sub(r"\n\s*", " ", svg).strip()
