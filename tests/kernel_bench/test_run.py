"""The command at tiny sizes on a CPU: what it prints and writes, and that it tells right from wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distributed import Ranks
from miles_spec import cli
from miles_spec.kernel_bench import contests, losses, packs, run
from miles_spec.kernel_bench.contests import TINY, Contest, Entry, Outcome, Setting, Truth, ready
from miles_spec.kernel_bench.measure import Meter
from miles_spec.kernel_bench.run import Row, checks, kernels, kernels_of_ranks, settle
from miles_spec.types import RunError

CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="runs other things on a GPU")


def tiny() -> Setting:
    return Setting(device=CPU, dtype=torch.float32, sizes=TINY, backend="reference", peers=False)


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CPU", TINY)


@without_gpu
def test_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results" / "kernels.json"
    assert cli.main(["bench", "kernels", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for shown in (
        "draft_loss: N 12",
        "shift: T 48",
        "logprob: N 12",
        "attention: T 24",
        "spread",
        "faster than best peer",
    ):
        assert shown in printed
    assert "There is no GPU" in printed

    content = json.loads(path.read_text())
    assert content.keys() == {"name", "commit", "hardware", "versions", "rows", "checks"}
    assert content["name"] == "kernels"
    rows = [Row(**row) for row in content["rows"]]
    assert {r.kernel for r in rows} == {"draft_loss", "shift", "logprob", "attention"}
    assert not any(r.wrong for r in rows)
    for row in rows:
        interpreted = "interpreter" in row.name
        assert (row.ms is None) == (row.spread is None) == interpreted
        assert row.host_ms is row.peak_gib is row.launches is row.syncs is None
        assert (row.value_error is None) == (row.kind in ("floor", "scale"))
    assert any("interpreter" in r.name for r in rows)
    by_name = {r.name: r for r in rows if r.kernel == "draft_loss" and "blocks" not in r.case}
    ours, peer, floor = (by_name[n] for n in ("ours, kl", "torch, eager", "floor, 3 products"))
    assert ours.ms and peer.ms and floor.ms
    assert ours.over_peer == pytest.approx(peer.ms / ours.ms)
    assert ours.over_floor == pytest.approx(ours.ms / floor.ms)
    assert by_name["ours, ce"].over_peer is None  # the peers compute something else

    # times on a CPU are held against nothing, correctness is
    assert len(content["checks"]) == len({(r.kernel, r.case) for r in rows})
    for held in content["checks"]:
        assert held.keys() == {"what", "value", "goal", "holds"} and held["holds"]


@without_gpu
def test_only_some_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernels", "--only", "shift"]) == 0
    printed = capsys.readouterr().out
    assert "shift: T 48" in printed and "logprob" not in printed
    assert cli.main(["bench", "kernels", "--only", "logprob,attention"]) == 0
    printed = capsys.readouterr().out
    assert "logprob: N 12" in printed and "attention: T 24" in printed and "shift" not in printed
    assert cli.main(["bench", "kernels", "--only", "shift,shifts"]) == 2
    assert "no kernel 'shifts' to measure; there are draft_loss, shift" in capsys.readouterr().err


@without_gpu
def test_wrong_kernel_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = losses.logprob

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = right(*arguments, **options)
        return replace(result, logprob=result.logprob * 1.001)

    monkeypatch.setattr(losses, "logprob", wrong)
    path = tmp_path / "k.json"
    assert cli.main(["bench", "kernels", "--only", "logprob", "--json", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out.count("WRONG, not timed") == 2  # the reference and Triton in its interpreter
    assert captured.err.startswith("miles-spec: error: 2 of our own calls went wrong: logprob (N 12")
    content = json.loads(path.read_text())
    rows = {r["name"]: r for r in content["rows"]}
    assert rows["ours"]["wrong"] and rows["ours"]["ms"] is None
    assert rows["ours"]["value_error"] == pytest.approx(1e-3, rel=0.1)
    assert rows["torch, eager"]["ms"] > 0
    assert [c["holds"] for c in content["checks"]] == [False]


@without_gpu
def test_kernel_that_raises_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(packs, "shift", broken)
    with pytest.raises(RunError, match="ours, shift: failed: RuntimeError: no kernel image"):
        kernels(only=["shift"])
    contest = list(packs.shift_contests(tiny()))[1]
    rows = {r.name: r for r in settle(contest, Meter(CPU), tiny())}
    assert rows["ours, shift"].ms is None and rows["torch, segment by segment"].ms
    assert not any(c["holds"] for c in checks(list(rows.values())))


def two(ours: Tensor, load: Any = None) -> Contest:
    """Ours, which gives `ours` where 1 is right, and another."""
    truth = Truth(expected=Outcome(value=torch.ones(3)))
    other = load or ready(lambda: Outcome(value=torch.ones(3)))
    return Contest(
        kernel="draft_loss",
        case="x",
        entries=[
            Entry(name="ours", kind="ours", load=ready(lambda: Outcome(value=ours)), truth=truth),
            Entry(name="other", kind="peer", load=other, truth=truth),
        ],
        tolerance=(1e-3, 1e-3),
        figures={"V": 10, "H": 4096},
    )


@pytest.mark.parametrize("given", [1.01, math.nan, math.inf])
def test_wrong_values(given: float) -> None:
    row, other = settle(two(torch.tensor([1.0, given, 1.0])), Meter(CPU), tiny())
    assert row.wrong and row.ms is None and other.ms and not other.wrong
    json.dumps(asdict(row), allow_nan=False)


def test_a_call_with_a_tolerance_of_its_own() -> None:
    contest = two(torch.tensor([1.0, 1.01, 1.0]))
    ours, *others = contest.entries
    entries = [replace(ours, tolerance=(1e-2, 1e-2)), *others]
    assert not settle(replace(contest, entries=entries), Meter(CPU), tiny())[0].wrong


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (ModuleNotFoundError("No module named 'fla'"), "not installed: No module named 'fla'"),
        (ImportError("undefined symbol"), "cannot be imported: undefined symbol"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "does not fit in the GPU's memory"),
    ],
)
def test_peer_that_is_missing_or_too_large(error: Exception, note: str) -> None:
    def load() -> Any:
        raise error

    ours, other = settle(two(torch.ones(3), load=load), Meter(CPU), tiny())
    assert other.note == note and other.ms is None
    assert ours.ms and ours.over_peer is None


@pytest.mark.parametrize(
    ("over_peer", "over_floor", "peak", "held"),
    [(1.6, 1.1, 1.4, [True] * 4), (1.4, 1.2, 1.6, [True, False, False, False])],
)
def test_goals(over_peer: float, over_floor: float, peak: float, held: list[bool]) -> None:
    row = Row(
        kernel="draft_loss",
        case="x",
        figures={"V": 10, "H": 4096},
        name="ours, kl",
        kind="ours",
        value_error=1e-4,
        over_peer=over_peer,
        over_floor=over_floor,
        peak_gib=peak,
    )
    found = checks([row])
    assert [c["holds"] for c in found] == held
    assert [c["value"] for c in found] == [1e-4, over_peer, over_floor, peak]
    assert all(c["holds"] is False for c in checks([replace(row, wrong=True, over_peer=None, over_floor=None)]))


def test_goals_of_the_shift() -> None:
    row = Row(
        kernel="shift",
        case="x",
        figures={"S": 64, "D": 3, "cp": 1},
        name="ours, draft_targets",
        kind="ours",
        value_error=0.0,
        launches=1,
        syncs=0,
    )
    assert [c["holds"] for c in checks([row])] == [True, True, True]
    assert [c["holds"] for c in checks([replace(row, value_error=1e-9, launches=2, syncs=1)])] == [False] * 3
    # with two ranks the exchange launches kernels too
    assert len(checks([replace(row, figures={"S": 64, "D": 3, "cp": 2})])) == 2


def shifted(group: dist.ProcessGroup) -> list[tuple[Row, ...]]:
    """Every contest of the shift with the pack cut over `group`."""
    setting = replace(tiny(), group=group)
    return [tuple(settle(c, Meter(CPU, group), setting)) for c in packs.shift_contests(setting)]


def test_ranks_measure_together(ranks: Ranks) -> None:
    first, second = ranks.run(shifted, 2)
    assert first == second  # times too: both give the slower one's
    rows = [r for contest in first for r in contest if r.kind == "ours"]
    assert [r.name for r in rows] == ["ours, draft_targets", "ours, shift"]
    assert all(r.figures["cp"] == 2 and r.value_error == 0 and r.ms for r in rows)


@pytest.mark.slow
def test_ranks(tmp_path: Path) -> None:
    path = tmp_path / "ranks.json"
    kernels_of_ranks(2, path, TINY)
    content = json.loads(path.read_text())
    assert content["name"] == "kernels_of_ranks" and content["ranks"] == 2
    ours = [r for r in content["rows"] if r["kind"] == "ours"]
    assert [r["name"] for r in ours] == ["ours, draft_targets", "ours, shift"]
    assert all(r["figures"]["cp"] == 2 and r["value_error"] == 0 and r["ms"] > 0 for r in ours)
    assert content["checks"] and all(c["holds"] for c in content["checks"])


@without_gpu
@pytest.mark.parametrize("name", ["kernels", "kernels_of_ranks"])
def test_a_run_cut_short_keeps_what_it_measured(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results" / "k.json"

    def contests(_: Setting) -> Iterator[Contest]:
        yield two(torch.ones(3))
        assert len(json.loads(path.read_text())["rows"]) == 2
        yield replace(two(torch.zeros(3)), case="y")
        raise KeyboardInterrupt

    # as in a checkout that tracks the result
    monkeypatch.setattr(run, "commit", lambda: "abc+changes" if path.exists() else "abc")
    monkeypatch.setitem(run.KERNELS, "shift", contests)
    with pytest.raises(KeyboardInterrupt):
        if name == "kernels":
            kernels(path, only=["shift"])
        else:
            try:
                run._rank(0, 1, str(tmp_path / "store"), str(path), TINY)
            finally:
                dist.destroy_process_group()
    content = json.loads(path.read_text())
    assert content["name"] == name and content["commit"] == "abc"
    rows = [Row(**r) for r in content["rows"]]
    assert [(r.case, r.name, r.wrong) for r in rows] == [
        ("x", "ours", False),
        ("x", "other", False),
        ("y", "ours", True),
        ("y", "other", False),
    ]
    assert [c["holds"] for c in content["checks"]] == [c["holds"] for c in checks(rows)]
    assert content["checks"][0]["holds"] and not content["checks"][-1]["holds"]


@pytest.mark.gpu
def test_everything_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    rows = kernels(path, sizes=contests.CPU)
    ours = [r for r in rows if r.kind == "ours"]
    assert all(r.ms and r.peak_gib is not None and not r.wrong for r in ours)
    shifts = [r for r in ours if r.kernel == "shift"]
    assert shifts and all(r.syncs == 0 and r.launches for r in shifts)
    what = [c["what"] for c in json.loads(path.read_text())["checks"]]
    for part in ("over the best peer", "GiB above the inputs", "launches", "host synchronisations", "error of values"):
        assert any(part in w for w in what)
