"""A push is verified or its fault is acted on: a bad target stops, a bad draft only costs speculation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeEngine, flip_bit
from miles_spec.rollout.engine import Engine, LocalMember, PushMember
from miles_spec.sync.session import Gathered, Syncer, TargetSyncError, compare
from miles_spec.sync.transports import Fault, InProcess
from miles_spec.types import Role, RunError, WeightUpdate

Named = dict[str, torch.Tensor]

SHAPES = {"embed": (7, 4), "layer.weight": (4, 4), "norm": (4,), "scale": ()}


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[Role, Named]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "target": {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()},
        "draft": {"fc": torch.randn(4, 8, generator=generator).to(dtype), "norm": torch.ones(4, dtype=dtype)},
    }


def syncer(bucket_bytes: int = 100) -> Syncer:
    return Syncer(InProcess(), bucket_bytes=bucket_bytes)


def push(sync: Syncer, engine: FakeEngine, new: dict[Role, Named], version: int = 1, draft_version: int = 5):  # type: ignore[no-untyped-def]
    return sync.push(
        engine.members(), version=version, target=new["target"], draft_version=draft_version, draft=new["draft"]
    )


def assert_serves(engine: FakeEngine, expected: dict[Role, Named]) -> None:
    for role, named in expected.items():
        for name, tensor in named.items():
            assert torch.equal(engine.tensors[role][name], tensor), (role, name)


def test_the_fake_is_an_engine_and_its_member() -> None:
    assert isinstance(FakeEngine({}), Engine) and isinstance(FakeEngine({}), LocalMember)


@pytest.mark.parametrize("bucket_bytes", [1, 600, 10**6])
def test_a_push_arrives_and_is_verified(bucket_bytes: int) -> None:
    engine, sync, new = FakeEngine(weights(0)), syncer(bucket_bytes), weights(1)
    receipts = push(sync, engine, new)
    assert_serves(engine, new)
    assert [(r.role, r.version, r.tensors, r.verified, r.attempts, r.engine) for r in receipts] == [
        ("target", 1, 4, True, 1, "fake"),
        ("draft", 5, 2, True, 1, "fake"),
    ]
    assert engine.versions() == {"target": 1, "draft": 5}
    assert engine.sessions == [(1, ("target",)), (5, ("draft",))]
    assert (sync.verified, sync.failed) == (2, 0)
    assert sync.seconds["target"] > 0 and sync.seconds["draft"] > 0
    sent = len(engine.loaded)
    assert sent == {1: 6, 600: 3, 10**6: 2}[bucket_bytes]
    assert sync.bytes == {"target": 4 * (28 + 16 + 4 + 1), "draft": 4 * (32 + 4)}


def test_the_target_alone() -> None:
    engine, new = FakeEngine(weights(0)), weights(1)
    (receipt,) = syncer().push([engine], version=1, target=new["target"])
    assert receipt.verified
    assert_serves(engine, {"target": new["target"], "draft": weights(0)["draft"]})


def test_tensors_are_cast_to_what_the_engine_serves() -> None:
    engine, new = FakeEngine(weights(0, torch.bfloat16)), weights(1)
    assert all(r.verified for r in push(syncer(), engine, new))
    assert_serves(engine, weights(1, torch.bfloat16))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flipped_bit_of_the_target_is_noticed(data: st.DataObject) -> None:
    victim = data.draw(st.sampled_from(sorted(SHAPES)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    engine, sync = FakeEngine(weights(0, dtype)), syncer()
    bit = data.draw(st.integers(0, 8 * engine.tensors["target"][victim].nbytes - 1))

    def on_load(role: Role, name: str, tensor: torch.Tensor) -> None:
        if name == victim:
            flip_bit(tensor, bit)

    engine.on_load = on_load
    with pytest.raises(
        TargetSyncError, match=f"'fake' does not serve the target of version 1.*{victim}: serves"
    ) as caught:
        push(sync, engine, weights(1, dtype))
    (receipt,) = caught.value.receipts
    assert not receipt.verified and len(receipt.mismatched) == 1 and receipt.tensors == 4
    assert engine.versions()["draft"] == 0  # the draft is not pushed after a bad target
    assert (sync.verified, sync.failed) == (0, 1)


def test_a_dropped_target_tensor_is_noticed() -> None:
    engine = FakeEngine(weights(0))
    engine.drop = {"norm"}
    with pytest.raises(TargetSyncError, match="norm: serves"):
        push(syncer(), engine, weights(1))


def test_a_lost_bucket_is_noticed() -> None:
    class Lossy(InProcess):
        def send(self, members, role, bucket):  # type: ignore[no-untyped-def]
            return super().send(members, role, bucket) if bucket[0][0] != "embed" else {}

    with pytest.raises(TargetSyncError, match="embed: serves"):
        push(Syncer(Lossy(), bucket_bytes=1), FakeEngine(weights(0)), weights(1))


def test_an_exception_in_the_target_closes_the_session_and_stops() -> None:
    engine, sync = FakeEngine(weights(0)), syncer()

    def on_load(role: Role, name: str, tensor: torch.Tensor) -> None:
        raise OSError("the bus is down")

    engine.on_load = on_load
    with pytest.raises(TargetSyncError, match="OSError: the bus is down"):
        push(sync, engine, weights(1))
    assert engine.open == () and len(engine.sessions) == 1
    engine.on_load = lambda *_: None
    assert all(r.verified for r in push(sync, engine, weights(1)))


def test_an_engine_that_keeps_its_old_version_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(weights(0))
    monkeypatch.setattr(engine, "versions", lambda: {"target": 0, "draft": 0})
    with pytest.raises(TargetSyncError, match="version: serves 0, sent 1"):
        push(syncer(), engine, weights(1))


def test_missing_and_unexpected_digests_are_faults() -> None:
    engine = FakeEngine(weights(0), version=2)
    sent = WeightUpdate(version=2, role="target", digests={"a": "x", "b": "y"})
    receipt = compare(engine, sent, {"b": "y", "c": "z"})
    assert receipt.mismatched == ("a: missing", "c: unexpected")
    assert not receipt.verified
    assert not compare(engine, WeightUpdate(version=2, role="target", digests={}), {}).verified  # nothing compared
    assert compare(engine, sent, sent.digests).verified


def test_a_bad_draft_is_pushed_again_and_then_good(caplog: pytest.LogCaptureFixture) -> None:
    engine, sync, new = FakeEngine(weights(0)), syncer(), weights(1)
    seen: list[str] = []

    def on_load(role: Role, name: str, tensor: torch.Tensor) -> None:
        if name == "fc" and not seen:
            flip_bit(tensor, 9)
        seen.extend([name] if name == "fc" else [])

    engine.on_load = on_load
    target, draft = push(sync, engine, new)
    assert target.verified and draft.verified and draft.attempts == 2
    assert engine.draft_depth == 3 and sync.drafting(engine)
    assert (sync.verified, sync.failed) == (2, 1)
    assert not caplog.records
    assert_serves(engine, new)


@pytest.mark.parametrize("fault", ["flip", "raise"])
def test_a_draft_that_stays_bad_is_switched_off_until_a_push_verifies(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine, sync = FakeEngine(weights(0)), syncer()

    def on_load(role: Role, name: str, tensor: torch.Tensor) -> None:
        if role == "draft" and fault == "flip":
            flip_bit(tensor, 0)
        elif role == "draft":
            raise RuntimeError("no room")

    engine.on_load = on_load
    for version in (1, 2):
        target, draft = push(sync, engine, weights(version), version, version)
        assert target.verified and not draft.verified and draft.attempts == 2
        assert draft.mismatched and (fault == "flip" or "RuntimeError: no room" in draft.mismatched[0])
        assert engine.draft_depth == 0 and not sync.drafting(engine)
        assert engine.open == ()
    assert len(caplog.records) == 1 and "goes on without speculation" in caplog.text  # once, not at every push
    assert (sync.verified, sync.failed) == (2, 4)

    engine.on_load = lambda *_: None
    _, draft = push(sync, engine, weights(3), 3, 3)
    assert draft.verified and draft.attempts == 1
    assert engine.draft_depth == 3 and sync.drafting(engine)
    assert_serves(engine, weights(3))


def test_a_bad_draft_on_a_member_that_cannot_restart_drafts_on(caplog: pytest.LogCaptureFixture) -> None:
    """As a joined server: worse guesses, and the run goes on."""
    engine, sync = FakeEngine(weights(0)), syncer()
    engine.drop = {"fc"}

    def set_draft_depth(depth: int) -> None:
        raise ValueError("it was not started by this run")

    engine.set_draft_depth = set_draft_depth  # type: ignore[method-assign]
    for version in (1, 2):
        target, draft = push(sync, engine, weights(version), version, version)
        assert target.verified and not draft.verified and draft.attempts == 2
        assert engine.draft_depth == 3 and engine.versions()["target"] == version and not engine.left
    assert "drafts on with what it has" in caplog.text and "not started by this run" in caplog.text
    engine.drop = set()
    _, draft = push(sync, engine, weights(3), 3, 3)
    assert draft.verified and engine.draft_depth == 3 and sync.drafting(engine)


def test_engines_lose_their_drafts_one_by_one() -> None:
    good, bad = FakeEngine(weights(0), name="good"), FakeEngine(weights(0), name="bad", draft_depth=5)
    bad.drop = {"fc"}
    sync = syncer()
    for engine in (good, bad):
        push(sync, engine, weights(1))
    assert (good.draft_depth, bad.draft_depth) == (3, 0)
    bad.drop = set()
    push(sync, bad, weights(1))
    assert (good.draft_depth, bad.draft_depth) == (3, 5)


def refused(new: dict[Role, Named], message: str, engine: FakeEngine | None = None, **versions: int) -> None:
    engine = engine or FakeEngine(weights(0), version=4)
    with pytest.raises(ValueError, match=message):
        push(syncer(), engine, new, **{"version": 5, **versions})
    assert engine.sessions == []  # nothing was begun, the target's session included


@pytest.mark.parametrize("role", ["target", "draft"])
def test_names_and_shapes_are_checked_before_anything_is_sent(role: Role) -> None:
    missing, extra, misshapen = weights(1), weights(1), weights(1)
    del missing[role]["norm"]
    extra[role]["odd"] = torch.zeros(1)
    misshapen[role]["norm"] = torch.zeros(4, 1)
    refused(missing, f"{role} tensor 'norm' is expected by engine 'fake' but not pushed")
    refused(extra, f"{role} tensor 'odd' is pushed, but engine 'fake' has none of that name")
    refused(misshapen, rf"{role} tensor 'norm' has shape \[4, 1\], but engine 'fake' expects \[4\]")


def test_versions_may_repeat_but_not_go_back() -> None:
    refused(weights(1), "serves target version 4 and a push must not go back to 3", version=3)
    refused(weights(1), "serves draft version 4 and a push must not go back to 2", draft_version=2)
    engine = FakeEngine(weights(0), version=4)
    assert all(r.verified for r in push(syncer(), engine, weights(1), 4, 4))


def test_an_engine_without_a_draft_is_named() -> None:
    refused(weights(1), "'fake' has no draft", FakeEngine({"target": weights(0)["target"]}))


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Syncer(InProcess(), bucket_bytes=0)
    with pytest.raises(ValueError, match="must be at least 1"):
        Syncer(InProcess(), draft_attempts=0)


def self_test(sync: Syncer, engine: FakeEngine, real: dict[Role, Named]):  # type: ignore[no-untyped-def]
    return sync.self_test([engine], version=0, target=real["target"], draft_version=0, draft=real["draft"])


def test_the_self_test_scrambles_every_tensor_and_puts_the_real_ones_back() -> None:
    real = weights(0, torch.bfloat16)
    engine, seen = FakeEngine(real), []
    engine.on_load = lambda role, name, tensor: seen.append((role, name, torch.equal(tensor, real[role][name])))
    receipts = self_test(syncer(), engine, real)
    assert [(r.role, r.verified) for r in receipts] == [("target", True), ("draft", True)]
    assert_serves(engine, real)
    for role, named in real.items():
        for name in named:
            assert [same for r, n, same in seen if (r, n) == (role, name)] == [False, True]


def test_the_self_test_notices_an_engine_that_ignores_pushes() -> None:
    """It holds the same weights already, so that a plain push verifies; only the scrambled ones tell."""
    engine = FakeEngine(weights(0))
    engine.frozen = True
    assert all(r.verified for r in push(syncer(), engine, weights(0), 0, 0))
    with pytest.raises(TargetSyncError, match="embed: serves"):
        self_test(syncer(), engine, weights(0))


def test_the_self_test_switches_off_a_draft_that_ignores_pushes() -> None:
    engine, sync = FakeEngine(weights(0)), syncer()
    engine.drop = {"fc"}
    target, draft = self_test(sync, engine, weights(0))
    assert target.verified and not draft.verified and not sync.drafting(engine)
    assert_serves(engine, {"target": weights(0)["target"]})
    assert engine.draft_depth == 0


def test_the_self_test_takes_bool_integer_and_empty_tensors() -> None:
    real: dict[Role, Named] = {
        "target": {
            "mask": torch.tensor([True, False]),
            "map": torch.arange(5),
            "none": torch.zeros(0, 3),
            "strided": torch.arange(6.0).view(2, 3).T,
        }
    }
    engine = FakeEngine(real)
    (receipt,) = syncer().self_test([engine], version=0, target=real["target"])
    assert receipt.verified
    assert_serves(engine, real)


def two() -> tuple[FakeEngine, FakeEngine]:
    return FakeEngine(weights(0), name="a"), FakeEngine(weights(0), name="b", draft_depth=5)


def push_all(sync: Syncer, engines: Sequence[FakeEngine], new: dict[Role, Named], version: int = 1):  # type: ignore[no-untyped-def]
    return sync.push(engines, version=version, target=new["target"], draft_version=version, draft=new["draft"])


def test_members_are_pushed_to_in_one_session() -> None:
    a, b = two()
    sync, new = syncer(), weights(1)
    receipts = push_all(sync, (a, b), new)
    assert [(r.engine, r.role, r.verified) for r in receipts] == [
        ("a", "target", True),
        ("b", "target", True),
        ("a", "draft", True),
        ("b", "draft", True),
    ]
    assert_serves(a, new)
    assert_serves(b, new)
    assert sync.verified == 4 and sync.bytes["target"] == 196  # once, not for each member


@pytest.mark.parametrize("fault", ["flip", "raise"])
def test_a_member_with_a_bad_target_leaves_and_the_others_go_on(fault: str) -> None:
    a, b = two()

    def on_load(role: Role, name: str, tensor: torch.Tensor) -> None:
        if fault == "raise":
            raise OSError("the bus is down")
        flip_bit(tensor, 3)

    a.on_load = on_load
    sync, new = syncer(1), weights(1)
    receipts = push_all(sync, (a, b), new)
    assert [(r.engine, r.role, r.verified) for r in receipts] == [
        ("a", "target", False),
        ("b", "target", True),
        ("b", "draft", True),
    ]
    assert len(a.left) == 1 and ("bus is down" if fault == "raise" else "embed: serves") in a.left[0]
    assert a.versions() == {"target": -1, "draft": 0} and not b.left
    assert len(a.loaded) == (1 if fault == "raise" else 4)  # nothing more after it failed
    assert_serves(b, new)
    a.on_load = lambda *_: None
    assert all(r.verified for r in push_all(sync, (a, b), weights(2), 2))
    assert a.versions() == b.versions() == {"target": 2, "draft": 2}


def test_no_member_left_raises_with_all_their_receipts() -> None:
    a, b = two()
    a.drop, b.drop = {"norm"}, {"embed"}
    with pytest.raises(
        TargetSyncError, match=r"'a' does not serve.*norm: serves.*'b' does not serve.*embed: serves"
    ) as e:
        push_all(syncer(), (a, b), weights(1))
    assert [r.engine for r in e.value.receipts] == ["a", "b"]
    assert a.left and b.left and a.versions()["target"] == b.versions()["target"] == -1


def test_only_the_member_with_a_bad_draft_gets_it_again() -> None:
    a, b = two()
    b.drop = {"fc"}
    sync, new = syncer(10**6), weights(1)
    receipts = push_all(sync, (a, b), new)
    assert [(r.engine, r.verified, r.attempts) for r in receipts[2:]] == [("a", True, 1), ("b", False, 2)]
    assert (a.draft_depth, b.draft_depth) == (3, 0) and sync.drafting(a) and not sync.drafting(b)
    assert (len(a.loaded), len(b.loaded)) == (2, 3)
    b.drop = set()
    push_all(sync, (a, b), new)
    assert b.draft_depth == 5 and sync.drafting(b)


def test_a_member_that_restarts_without_its_draft_gets_the_target_again() -> None:
    a, b = two()
    b.restarts, b.drop = True, {"fc"}
    sync, new = syncer(10**6), weights(1)
    receipts = push_all(sync, (a, b), new)
    assert [(r.engine, r.role, r.verified) for r in receipts] == [
        ("a", "target", True),
        ("b", "target", True),
        ("a", "draft", True),
        ("b", "draft", False),
    ]
    assert b.versions() == {"target": 1} and b.draft_depth == 0
    assert [roles for _, roles in b.sessions] == [("target",), ("draft",), ("draft",), ("target",)]
    # it has no place for a draft now, and is not asked to take one
    receipts = push_all(sync, (a, b), weights(2), 2)
    assert [(r.engine, r.role) for r in receipts] == [("a", "target"), ("b", "target"), ("a", "draft")]
    assert all(r.verified for r in receipts) and not sync.drafting(b)
    # somebody started it anew with its draft: verified again, it drafts
    b.drop = set()
    b.set_draft_depth(5)
    b.sessions.clear()
    assert len(push_all(sync, (a, b), weights(3), 3)) == 4
    assert sync.drafting(b) and b.draft_depth == 5 and b.versions() == {"target": 3, "draft": 3}


@pytest.mark.parametrize("alone", [False, True])
def test_a_member_that_does_not_start_again_without_its_draft_leaves(alone: bool) -> None:
    a, b = two()
    b.drop = {"fc"}

    def set_draft_depth(depth: int) -> None:
        b.served = {"target": -1}  # what was served ended with its process, and so did its manifest
        b.tensors = {}
        raise RunError("no GPU left")

    b.set_draft_depth = set_draft_depth  # type: ignore[method-assign]
    if alone:
        with pytest.raises(TargetSyncError, match=r"'b' does not serve .* did not start again .* no GPU"):
            push_all(syncer(), (b,), weights(1))
    else:
        receipts = push_all(syncer(), (a, b), weights(1))
        assert [(r.engine, r.role) for r in receipts if r.verified] == [("a", "target"), ("a", "draft")]
    assert "no GPU left" in b.left[0]


def test_a_restart_whose_target_does_not_verify_leaves() -> None:
    engine = FakeEngine(weights(0), restarts=True)
    engine.drop = {"fc"}

    def on_load(role: Role, name: str, tensor: torch.Tensor) -> None:
        if engine.draft_depth == 0:
            flip_bit(tensor, 0)

    engine.on_load = on_load
    with pytest.raises(TargetSyncError, match="embed: serves"):
        push(syncer(), engine, weights(1))
    assert len(engine.left) == 1


def test_a_member_that_another_one_cut_off_is_pushed_to_again() -> None:
    class Chain(InProcess):
        """When `a` fails, nobody gets anything."""

        def send(self, members, role, bucket):  # type: ignore[no-untyped-def]
            faults = super().send(members, role, bucket)
            if "a" in faults:
                faults |= {m.name: Fault(why="cut off", by="a") for m in members if m.name != "a"}
            return faults

    a, b = two()
    a.on_load = lambda *_: (_ for _ in ()).throw(OSError("gone"))
    sync = Syncer(Chain())
    receipts = push_all(sync, (a, b), weights(1))
    assert [(r.engine, r.verified, r.attempts) for r in receipts if r.role == "target"] == [
        ("a", False, 1),
        ("b", True, 2),
    ]
    assert_serves(b, weights(1))
    assert (sync.verified, sync.failed) == (2, 2)


def test_what_serves_nothing_takes_any_version() -> None:
    engine = FakeEngine(weights(0), version=4)
    engine.leave("a test")
    engine.served["draft"] = -1
    assert all(r.verified for r in push(syncer(), engine, weights(1), 2, 2))


def test_all_members_are_checked_before_anything_is_sent() -> None:
    a, b = FakeEngine(weights(0), name="a"), FakeEngine(weights(0), name="b", version=3)
    with pytest.raises(ValueError, match="'b' serves target version 3"):
        push_all(syncer(), (a, b), weights(1))
    half = FakeEngine(weights(0, torch.bfloat16), name="half")
    with pytest.raises(ValueError, match="'a' serves target tensor 'embed' as float32, engine 'half' as bfloat16"):
        push_all(syncer(), (a, half), weights(1))
    assert not a.sessions and not b.sessions and not half.sessions
    with pytest.raises(ValueError, match="at least one engine"):
        push_all(syncer(), (), weights(1))


def gathered(new: Named, given: Sequence[tuple[str, torch.Tensor]] | None = None) -> tuple[Gathered, list[str]]:
    taken: list[str] = []

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in new.items() if given is None else given:
            taken.append(name)
            yield name, tensor.clone()

    return Gathered(shapes={n: tuple(t.shape) for n, t in new.items()}, tensors=gather), taken


def test_weights_are_gathered_once_for_all_members() -> None:
    a, b = two()
    new = weights(1)["target"]
    target, taken = gathered(new)
    assert all(r.verified for r in syncer(1).push((a, b), version=1, target=target))
    assert taken == list(SHAPES)
    assert_serves(b, {"target": new})


def test_shapes_are_checked_before_anything_is_gathered() -> None:
    engine, (target, taken) = FakeEngine(weights(0)), gathered({**weights(1)["target"], "norm": torch.zeros(5)})
    with pytest.raises(ValueError, match="'norm' has shape"):
        syncer().push([engine], version=1, target=target)
    assert not taken and not engine.sessions


@pytest.mark.parametrize(
    "given, message",
    [
        ([("embed", torch.zeros(7, 4))], "norm: unexpected"),
        ([*weights(1)["target"].items(), ("norm", torch.ones(4))], "'norm' comes twice"),
        ([("odd", torch.zeros(7, 4))], "KeyError: 'odd'"),
    ],
)
def test_weights_that_are_not_gathered_as_promised_do_not_verify(
    given: list[tuple[str, torch.Tensor]], message: str
) -> None:
    engine = FakeEngine(weights(0))
    with pytest.raises(TargetSyncError, match=message):
        syncer().push([engine], version=1, target=gathered(weights(1)["target"], given)[0])
    assert engine.open == ()


class Keeping(FakeEngine):
    """Keeps its door open from one session to the next; `stuck` is why it does not close."""

    def __init__(self, name: str = "fake", **arguments: object) -> None:
        super().__init__(weights(0), name=name, **arguments)  # type: ignore[arg-type]
        self.pushes: list[list[Role]] = []
        self.stuck = ""
        self.pushing = False

    def begin_push(self, roles: Sequence[Role]) -> None:
        assert not self.pushing
        self.pushes.append(list(roles))
        self.pushing = True

    def begin_update(self, version: int, roles: Sequence[Role]) -> None:
        assert self.pushing
        super().begin_update(version, roles)

    def set_draft_depth(self, depth: int) -> None:
        assert not self.pushing
        super().set_draft_depth(depth)

    def end_push(self) -> None:
        assert self.pushing and not self.open
        self.pushing = False
        if self.stuck:
            self.served = dict.fromkeys(self.served, -1)
            raise RunError(self.stuck)


def test_all_sessions_of_a_push_are_in_one() -> None:
    engine, sync = Keeping(), syncer()
    assert isinstance(engine, PushMember)
    assert all(r.verified for r in push(sync, engine, weights(1)))
    assert engine.pushes == [["target", "draft"]] and not engine.pushing
    new = weights(2)
    receipts = sync.self_test([engine], version=2, target=new["target"], draft_version=6, draft=new["draft"])
    assert all(r.verified for r in receipts) and engine.pushes[1:] == [["target", "draft"]]
    assert sync.push([engine], version=3, target=new["target"])[0].verified
    assert engine.pushes[2:] == [["target"]] and not engine.pushing
    engine.drop = {"norm"}
    with pytest.raises(TargetSyncError):
        push(sync, engine, weights(4), 4, 7)
    assert not engine.pushing


def test_a_restart_without_the_draft_is_a_push_of_its_own() -> None:
    engine = Keeping(restarts=True)
    engine.drop = {"fc"}
    target, draft = push(syncer(), engine, weights(1))
    assert target.verified and not draft.verified
    assert engine.pushes == [["target", "draft"], ["target"]] and not engine.pushing


def test_a_push_that_does_not_end_verified_nothing() -> None:
    a, b, sync = Keeping("a"), Keeping("b"), syncer()
    b.stuck = "the cache is in use"
    receipts = push_all(sync, (a, b), weights(1))
    assert [(r.engine, r.role, r.verified) for r in receipts] == [
        ("a", "target", True),
        ("b", "target", False),
        ("a", "draft", True),
        ("b", "draft", False),
    ]
    assert "push: RunError: the cache is in use" in b.left[0] and not a.left
    assert b.draft_depth == 3, "its draft was not at fault"
    assert (sync.verified, sync.failed) == (2, 2)
    with pytest.raises(TargetSyncError, match="the cache is in use"):
        push_all(sync, (b,), weights(2), 2)


def test_a_session_ends_everywhere_when_the_trainer_fails() -> None:
    class Interrupted(InProcess):
        def send(self, members, role, bucket):  # type: ignore[no-untyped-def]
            raise KeyboardInterrupt

    a, b = Keeping("a"), Keeping("b")
    with pytest.raises(KeyboardInterrupt):
        push_all(Syncer(Interrupted()), (a, b), weights(1))
    assert a.open == b.open == ()
    assert not a.pushing and not b.pushing
