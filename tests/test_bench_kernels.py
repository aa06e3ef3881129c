"""`miles-spec bench kernels` at tiny sizes on a CPU: what it prints and writes, and that it tells right from wrong."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distributed import Ranks
from miles_spec import bench_kernels, cli, contests, loss_contests, measure, pack_contests, peers
from miles_spec.bench_kernels import Row, checks, kernels, kernels_of_ranks, settle
from miles_spec.contests import TINY, Contest, Entry, Outcome, Setting, Truth, ready, relative_error
from miles_spec.kernels.backend import Backend
from miles_spec.kernels.layout import PackedLayout
from miles_spec.measure import Meter
from miles_spec.types import RunError

CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="runs other things on a GPU")


def tiny(backend: Backend = "reference") -> Setting:
    return Setting(device=CPU, dtype=torch.float32, sizes=TINY, backend=backend, peers=False)


@pytest.fixture(autouse=True)
def tiny_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "CPU", TINY)
    monkeypatch.setattr(measure, "SHORT_S", 0.0)


@without_gpu
def test_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results" / "kernels.json"
    assert cli.main(["bench", "kernels", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for shown in ("draft_loss: N 12", "shift: T 48", "logprob: N 12", "attention: T 24", "faster than best peer"):
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
        assert (row.ms is None) == interpreted and row.host_ms is row.peak_gib is row.launches is row.syncs is None
        assert (row.value_error is None) == (row.kind in ("floor", "scale"))
    assert any("interpreter" in r.name for r in rows)
    by_name = {r.name: r for r in rows if r.kernel == "draft_loss"}
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
def test_only_one_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernels", "--only", "shift"]) == 0
    printed = capsys.readouterr().out
    assert "shift: T 48" in printed and "logprob" not in printed
    assert cli.main(["bench", "kernels", "--only", "shifts"]) == 2
    assert "no kernel 'shifts' to measure; there are draft_loss, shift" in capsys.readouterr().err


@without_gpu
def test_wrong_kernel_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = loss_contests.logprob

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = right(*arguments, **options)
        return replace(result, logprob=result.logprob * 1.001)

    monkeypatch.setattr(loss_contests, "logprob", wrong)
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

    monkeypatch.setattr(pack_contests, "shift", broken)
    with pytest.raises(RunError, match="ours, shift: failed: RuntimeError: no kernel image"):
        kernels(only="shift")
    contest = list(pack_contests.shift_contests(tiny()))[1]
    rows = {r.name: r for r in settle(contest, Meter(CPU), tiny())}
    assert rows["ours, shift"].ms is None and rows["torch, segment by segment"].ms
    assert not any(c["holds"] for c in checks(list(rows.values())))


@pytest.mark.parametrize("field", ["labels", "mask", "teacher", "keys", "positions", "inputs"])
def test_one_wrong_index_is_seen(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = pack_contests.draft_targets

    def wrong(*arguments: Any, **options: Any) -> Any:
        targets = right(*arguments, **options)
        value = getattr(targets, field).clone()
        row = int(targets.mask[0].nonzero()[0])
        at = (0, row) if value.dim() == 2 else (row,)
        value[at] = not value[at] if value.dtype == torch.bool else value[at] + 1
        return replace(targets, **{field: value})

    monkeypatch.setattr(pack_contests, "draft_targets", wrong)
    row = settle(next(pack_contests.shift_contests(tiny())), None, tiny())[0]
    assert row.wrong and row.value_error and row.value_error > 0


def test_every_gradient_of_the_attention_counts() -> None:
    contest = next(pack_contests.attention_contests(tiny()))
    ours = contest.entries[0]
    assert ours.truth is not None
    given = ours.load()()
    assert len(given.gradients) == 3 * TINY.chain
    for i in range(len(given.gradients)):
        spoiled = [g.clone() for g in given.gradients]
        spoiled[i][..., 0, 0] += 0.01
        value, gradient = ours.truth.errors(Outcome(value=given.value, gradients=tuple(spoiled)))
        assert value <= contest.tolerance[0] and gradient is not None and gradient > contest.tolerance[1]


def two(ours: Tensor, *, load: Any = None, kind: Any = "peer", floor: str | None = None) -> Contest:
    """Ours, which gives `ours` where 1 is right, and another."""
    truth = Truth(expected=Outcome(value=torch.ones(3)))
    other = load or ready(lambda: Outcome(value=torch.ones(3)))
    return Contest(
        kernel="draft_loss",
        case="x",
        entries=[
            Entry(name="ours", kind="ours", load=ready(lambda: Outcome(value=ours)), truth=truth, floor=floor),
            Entry(name="other", kind=kind, load=other, truth=truth),
        ],
        tolerance=(1e-3, 1e-3),
        figures={"V": 10, "H": 4096},
    )


@pytest.mark.parametrize("given", [1.01, math.nan, math.inf])
def test_wrong_values(given: float) -> None:
    row, other = settle(two(torch.tensor([1.0, given, 1.0])), Meter(CPU), tiny())
    assert row.wrong and row.ms is None and other.ms and not other.wrong
    json.dumps(asdict(row), allow_nan=False)


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
    return [tuple(settle(c, Meter(CPU, group), setting)) for c in pack_contests.shift_contests(setting)]


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


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.0, 0.5]), torch.zeros(2)) == 0.5
    assert relative_error(torch.tensor([2**53], dtype=torch.int64), torch.tensor([2**53])) == 0


def test_plain_roll_stays_in_its_segment() -> None:
    roll = peers.plain_roll([0, 3, 3, 4, 6])
    assert roll(torch.arange(1, 7)).tolist() == [2, 3, 0, 0, 6, 0]


def test_plain_targets() -> None:
    # a prompt of 3 and a response of 4: depth 1 trains rows 2, 3 and 4, which predict tokens 4, 5 and 6
    tokens, layout = torch.arange(100, 107), PackedLayout.make([7])
    inputs, labels, positions, teacher, keys, mask = pack_contests.plain_targets(
        tokens, torch.arange(7) >= 3, layout, 2
    ).tolist()
    assert mask == [[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0]]
    assert inputs == [[-1, -1, 103, 104, 105, -1, -1], [-1, -1, 104, 105, -1, -1, -1]]
    assert labels == [[-1, -1, 104, 105, 106, -1, -1], [-1, -1, 105, 106, -1, -1, -1]]
    assert positions == [[-1, -1, 2, 3, 4, -1, -1], [-1, -1, 3, 4, -1, -1, -1]]
    assert teacher == [[-1, -1, 3, 4, 5, -1, -1], [-1, -1, 4, 5, -1, -1, -1]]
    assert keys == [[1, 1, 1, 1, 1, 1, 0]] * 2


def test_block_weights() -> None:
    a, b, c, d = 0.5, 0.25, 0.75, 0.5
    weights = loss_contests.block_weights(torch.tensor([a, b, c, d], dtype=torch.float64))
    assert weights.tolist() == pytest.approx([1 + b + b * c, a + a * c, a * b, 1])


def test_meter_on_a_cpu() -> None:
    calls = {"a": 0, "b": 0}

    def call(name: str) -> None:
        calls[name] += 1

    times = Meter(CPU).times({name: lambda name=name: call(name) for name in calls})
    assert calls == {"a": measure.WARM_UP + measure.TURNS, "b": measure.WARM_UP + measure.TURNS}
    assert all(t.ms >= 0 and t.host_ms is None for t in times.values())


def test_no_benchmark_hides_a_package() -> None:
    # a script's own folder comes first on its path, and transformers looks for a package named `kernels`
    scripts = (Path(__file__).parents[1] / "benchmarks").glob("*.py")
    assert not {script.stem for script in scripts} & {"kernels", "draft", "sync", "train", "rollout"}


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
def test_meter_on_a_gpu() -> None:
    meter, x = Meter(torch.device("cuda")), torch.zeros(1 << 20, device="cuda")
    assert meter.launches(lambda: x.add_(1)) == 1
    assert meter.launches(lambda: (x.add_(1), x.mul_(2), x.clone())) == 3
    assert meter.syncs(lambda: x.add_(1)) == 0
    assert meter.syncs(lambda: (x[0].item(), x[1].item())) == 2
    assert meter.peak_gib(lambda: torch.empty(1 << 28, dtype=torch.int8, device="cuda")) == pytest.approx(0.25)
    a = torch.randn(8192, 8192, device="cuda")
    times = meter.times({"product": lambda: a @ a, "wait": lambda: torch.cuda.synchronize()})
    assert times["product"].host_ms is not None and times["product"].host_ms < times["product"].ms
    assert times["wait"].ms < times["product"].ms


@pytest.mark.gpu
@needs_gpu
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
