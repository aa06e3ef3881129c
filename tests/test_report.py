"""The report against what a run directory holds: nothing invented, nothing lost, nothing unescaped."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from miles_spec import rundir
from miles_spec.plots import COLOURS, PLOTS, Chart
from miles_spec.report import write

DOCS = Path(__file__).parent.parent / "docs" / "metrics.md"
VOID = {"meta", "br"}


def step_line(step: int, **overrides: Any) -> dict[str, Any]:
    """A step with every metric."""
    line = dict(
        step=step, time_s=10.0 * step, target_version=step, draft_version=step, draft_age=1,
        reward_mean=0.1 * step, reward_std=0.2, response_tokens_mean=80.0, finish_length_fraction=0.1, samples=8,
        groups_dropped=0, verify_steps=100, accept_length=2.0 + 0.1 * step, accept_rate_by_position=[0.8, 0.5],
        accept_length_cotrained=2.05 + 0.1 * step, accept_length_frozen=1.9, accept_estimate_error=0.05,
        tokens_per_s=60.0, tokens_per_s_plain=40.0, net_speedup=1.5, net_speedup_error=0.04, policy_loss=-0.01,
        entropy=0.7, grad_norm=1.0, clip_fraction=0.0, tis_clip_fraction=0.0, rollout_kl=2e-4, rollout_logprob_diff=0.1,
        ref_kl=0.0, draft_loss=1.2, draft_loss_by_depth=[1.0, 1.4], draft_grad_norm=1.0, draft_share=0.04,
        seconds_rollout=5.0, seconds_reward=0.1, seconds_train=3.0, seconds_draft=0.1, seconds_sync=0.2,
        seconds_checkpoint=0.0, rollout_seconds_prefill=0.4, rollout_seconds_draft=0.6, rollout_seconds_verify=3.5,
        rollout_seconds_other=0.5, receipts_verified=2, receipts_failed=0,
    )  # fmt: skip
    return {**line, **overrides}


def sample_line(step: int, **overrides: Any) -> dict[str, Any]:
    pieces = ["The", " <u>", " 42", "\n"]
    line = dict(
        step=step, prompt_id=f"p{step}", prompt=f"6 < 7 & {step}?", response="".join(pieces), reward=1.0, finish="stop",
        pieces=pieces, accepted=[False, True, True, False],
    )  # fmt: skip
    return {**line, **overrides}


SUMMARY = dict(
    reward_first=0.125, reward_last=0.575, accept_length_cotrained=2.75, accept_length_frozen=1.5,
    tokens_per_s_speculative=61.5, tokens_per_s_plain=41.5, net_speedup=1.48, net_speedup_error=0.03, seconds={},
    receipts_verified=12, receipts_failed=0, steps=3, steps_averaged=1,
)  # fmt: skip


def run_dir(path: Path, steps: list[dict[str, Any]], summary: Mapping[str, Any] | None = SUMMARY) -> Path:
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def jsonl(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Page(HTMLParser):
    """Checks that tags nest, and keeps ids, references and figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.marks: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "action"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "mark":
            self.marks.append(data)


def text_of(page: str) -> str:
    """The page's words, without tags and style."""
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)).split())


def shown(page: str) -> set[str]:
    """Which plots the page has."""
    return set(re.findall(r'<figure id="([^"]+)"', page))


def test_a_whole_run(tmp_path: Path) -> None:
    warmup = [{"warmup_step": i, "draft_loss": 3.0 - i, "draft_loss_by_depth": [2.0, 3.0]} for i in (1, 2)]
    run_dir(tmp_path, [*warmup, *(step_line(i) for i in (1, 2, 3))])
    jsonl(tmp_path / "samples.jsonl", [sample_line(i) for i in (1, 2, 3)])
    (tmp_path / "config.toml").write_text('steps = 3\nout = "a<u>"\n[model]\npath = "tiny & small"\n')
    rows = [
        {"mode": mode, "batch": batch, "tokens_per_s": speed * batch, "accept_length": length, "speedup": speed / 10}
        for batch in (4, 1)
        for mode, speed, length in (("plain", 10.0, None), ("cotrained", 15.5, 2.25))
    ]
    (tmp_path / "bench.json").write_text(json.dumps(rows))

    out = write(tmp_path)

    assert out == tmp_path / "report.html"
    page = out.read_text(encoding="utf-8")
    parsed = Page(page)
    assert shown(page) == {plot.slug for plot in PLOTS}
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "script" not in parsed.tags and "link" not in parsed.tags and "http" not in page and "@import" not in page
    assert parsed.references and all(reference.removeprefix("#") in parsed.ids for reference in parsed.references)
    words = text_of(page)
    for card in ("0.125 → 0.575", "2.75 vs 1.5", "61.5 vs 41.5", "1.48", "whose error is 3.0%", "Receipts 12"):
        assert card in words
    assert "3 steps · 30 s · model tiny & small" in words
    assert "differed from the count by +0.05 in the last step, and by at most 0.05 in any" in words
    # the bench table: sorted by batch, and no speed-up of no speculation over itself
    assert "1 10 15.5 2.25 1.55 4 40 62 2.25 1.55" in words
    assert 'a<u>"' in words and "<u>" not in page
    # first and last step only, with exactly the accepted pieces marked
    assert "6 < 7 & 1?" in words and "6 < 7 & 3?" in words and "6 < 7 & 2?" not in words
    assert parsed.marks == ["drafted and accepted", *[" <u>", " 42"] * 2]


def test_colours_follow_the_theme(tmp_path: Path) -> None:
    page = write(run_dir(tmp_path, [step_line(1), step_line(2)])).read_text(encoding="utf-8")
    body = page[page.index("<body>") :]
    assert not re.search(r"#[0-9a-f]{6}\b", body), "a colour that no theme can change"
    used = set(re.findall(r"var\(--(\w+)\)", body))
    assert used <= set(COLOURS) and {"cotrained", "frozen", "plain"} <= used
    hexes = [pair[theme] for theme in (0, 1) for pair in COLOURS.values()]
    assert len(hexes) == len(set(hexes)), "two names of one colour cannot be told apart again"


def test_one_step(tmp_path: Path) -> None:
    page = write(run_dir(tmp_path, [step_line(1)])).read_text(encoding="utf-8")
    assert shown(page) == {plot.slug for plot in PLOTS if not plot.warmup}
    assert "1 step" in text_of(page)


def test_a_run_without_a_draft_says_what_is_left_out(tmp_path: Path) -> None:
    kept = ("step", "reward_mean", "rollout_kl", "tokens_per_s", "seconds_rollout", "seconds_train")
    lines = [{k: v for k, v in step_line(i).items() if k in kept} for i in (1, 2)]
    lines[1] |= {"accept_length": None, "draft_loss_by_depth": [], "net_speedup": math.nan}
    summary = {**SUMMARY, "accept_length_cotrained": None, "accept_length_frozen": None, "net_speedup": None}
    page = write(run_dir(tmp_path, lines, summary)).read_text(encoding="utf-8")
    assert shown(page) == {"reward", "rollout-kl", "tokens-per-s", "seconds"}
    words = text_of(page)
    assert (
        "No plot for want of recorded values: Accept length, Acceptance by position, Net speed-up, Draft loss, "
        "Time within the rollout." in words
    )
    assert "nan" not in words.lower() and "co-trained vs frozen" not in words


def test_an_interrupted_run_shows_its_steps(tmp_path: Path) -> None:
    run_dir(tmp_path, [step_line(1), step_line(2, reward_mean=None), step_line(3)], summary=None)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward_m')
    words = text_of(write(tmp_path).read_text(encoding="utf-8"))
    assert "interrupted after step 3" in words
    assert "cut off in the middle of a write" in words
    assert "0.1 → 0.3" in words
    assert "Receipts 6 " in words


def test_a_run_that_ended_early_says_so(tmp_path: Path) -> None:
    run_dir(tmp_path, [step_line(1)])
    (tmp_path / "config.toml").write_text("steps = 5\n")
    assert "This run ended after step 1 of 5." in text_of(write(tmp_path).read_text(encoding="utf-8"))


def test_a_draft_that_was_trained_alone(tmp_path: Path) -> None:
    """Its run file may ask for more steps of training than its data gave."""
    summary = {"steps": 3, "accept_length_before": 1.25, "accept_length_after": 1.75}
    (folder := run_dir(tmp_path, [{"step": 3, "draft_loss": 2.0}], summary)).joinpath("config.toml").write_text(
        "steps = 100\n"
    )
    text = text_of(write(folder).read_text(encoding="utf-8"))
    assert "1.25 → 1.75" in text and "held-out" in text and "ended after" not in text


def test_a_failed_receipt_stands_out(tmp_path: Path) -> None:
    page = write(run_dir(tmp_path, [step_line(1)], {**SUMMARY, "receipts_failed": 1})).read_text(encoding="utf-8")
    assert '<strong class="bad">1 failed</strong>' in page


def test_a_step_that_ran_again_counts_once(tmp_path: Path) -> None:
    run = rundir.read(run_dir(tmp_path, [step_line(1), step_line(2, reward_mean=9.0), step_line(2, reward_mean=0.5)]))
    assert rundir.column(run.steps, "reward_mean") == [0.1, 0.5]


def test_lists_of_changing_length(tmp_path: Path) -> None:
    lines = [{"step": 1, "x": [1, 2]}, {"step": 2}, {"step": 3, "x": [3]}, {"step": 4, "x": [None, 4]}]
    columns = rundir.list_column(lines, "x")
    assert [[v if v == v else None for v in c] for c in columns] == [[1, None, 3, None], [2, None, None, 4]]


def test_a_missing_value_is_a_gap(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    lines = [step_line(i, reward_mean=v) for i, v in enumerate([1.0, 2.0, None, 4.0, None], 1)]
    run = rundir.read(run_dir(tmp_path, lines))
    axes = Figure().subplots()
    chart = Chart(run, axes, run.steps, "step")
    assert chart.line(chart.column("reward_mean"), "mean", "policy")
    curve, dots = axes.lines
    assert [v if v == v else None for v in curve.get_ydata()] == [1.0, 2.0, None, 4.0, None]
    assert list(dots.get_xdata()) == [4]
    assert chart.keys[0].value == 4.0
    assert not chart.line([math.nan] * 5, "none", "policy")
    assert len(chart.keys) == 1


def test_phases_are_stacked(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    run = rundir.read(run_dir(tmp_path, [step_line(1), step_line(2, seconds_rollout=7.0, seconds_train=None)]))
    axes = Figure().subplots()
    chart = Chart(run, axes, run.steps, "step")
    chart.stack([("seconds_rollout", "rollout"), ("seconds_none", "none"), ("seconds_train", "train")])
    assert [key.label for key in chart.keys] == ["rollout", "train"]
    rollout, train = (area.get_datalim(axes.transData).bounds for area in axes.collections)
    assert rollout == (0.5, 0.0, 2.0, 7.0)
    # 5 + 3 in the first step, 7 + nothing in the second
    assert train == (0.5, 5.0, 2.0, 3.0)


@pytest.mark.parametrize("zero", [True, False])
def test_kl_is_logarithmic_unless_it_is_zero(tmp_path: Path, zero: bool) -> None:
    lines = [step_line(1, rollout_kl=1e-5), step_line(2, rollout_kl=0.0 if zero else 1e-3)]
    page = write(run_dir(tmp_path, lines)).read_text(encoding="utf-8")
    figure = page[page.index('<figure id="rollout-kl"') :].split("</figure>")[0]
    assert (">0.0001<" in figure) is not zero


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run_dir(tmp_path, [step_line(1), step_line(2)])
    assert write(tmp_path).read_bytes() == write(tmp_path).read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", None, "cannot read .*metrics.jsonl: No such file or directory"),
        ("metrics.jsonl", b"", "metrics.jsonl holds no step yet"),
        ("metrics.jsonl", b'{"warmup_step": 1}\n', "metrics.jsonl holds no step yet"),
        ("metrics.jsonl", b'{"step": 1}\n{"st\n{"step": 3}\n', "metrics.jsonl, line 2 is not valid JSON"),
        ("metrics.jsonl", b'{"step": 1}\n[2]\n', "metrics.jsonl, line 2 is not a JSON object"),
        ("metrics.jsonl", b'{"step": 1}\n{"reward_mean": 1}\n', "metrics.jsonl, line 2: `step` or `warmup_step`"),
        ("metrics.jsonl", b'{"step": 1, "reward_mean": "high"}\n', "reward_mean is 'high', not a number"),
        ("metrics.jsonl", b'{"step": 1, "draft_loss_by_depth": 2}\n', "draft_loss_by_depth is 2, not a list"),
        ("metrics.jsonl", b"\xff\xfe\n", "metrics.jsonl is not UTF-8 text"),
        ("samples.jsonl", b'{"step": 1}\n', "samples.jsonl, line 1: missing accepted, finish, pieces"),
        ("summary.json", b"{", "summary.json is not valid JSON"),
        ("summary.json", b"[]", "summary.json must hold a JSON object"),
        ("summary.json", b'{"reward_last": "high"}', "summary.json: reward_last is 'high', not a number"),
        ("bench.json", b'[{"mode": "plain"}]', "bench.json: each row must have accept_length, batch"),
        ("config.toml", b"steps = \n", "config.toml is not valid TOML"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    run_dir(tmp_path, [step_line(1)])
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        write(tmp_path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "report.html").exists()


def test_sample_pieces_and_flags_must_match(tmp_path: Path) -> None:
    run_dir(tmp_path, [step_line(1)])
    jsonl(tmp_path / "samples.jsonl", [sample_line(1), sample_line(1, accepted=[True])])
    with pytest.raises(ValueError, match=r"samples.jsonl, line 2: `pieces` and `accepted` differ in length"):
        write(tmp_path)


def documented() -> set[str]:
    """Names in the first column of the tables of docs/metrics.md."""
    cells = re.findall(r"^\| (`.*?`) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_metric_shown_is_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from miles_spec import live, plots, report

    asked: set[str] = set()
    for module in (plots, report):
        for reader in ("column", "list_column"):
            if hasattr(module, reader):
                real = getattr(rundir, reader)
                monkeypatch.setattr(module, reader, lambda lines, name, real=real: asked.add(name) or real(lines, name))
    write(run_dir(tmp_path, [{"warmup_step": 1, "draft_loss": 1.0}, step_line(1)], summary=None))
    asked |= {column.metric for column in live.COLUMNS}
    assert len(asked) > 25
    assert asked <= documented()
    assert set(step_line(1)) | set(SUMMARY) <= documented()
