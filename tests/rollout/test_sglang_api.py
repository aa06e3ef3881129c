"""A server's keys, what it says of itself, and what its statuses mean."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fake_sglang import serving
from miles_spec.rollout.sglang_api import (
    Api,
    Keys,
    ServerBusy,
    check_served,
    refuse,
)
from miles_spec.types import RunError

KEYS = Keys(api="api", admin="admin")


@pytest.mark.parametrize(("version", "selector"), [("0.5.17", False), ("0.5.21.post1", True)])
def test_features_are_what_the_server_says(version: str, selector: bool) -> None:
    secrets = {"api_key": "api", "admin_api_key": "admin", "tp_size": 2}
    with serving(version=version, depth=2, api_key="api", admin_key="admin", info=secrets) as fake:
        features = Api(fake.url, KEYS).features()
    assert (features.version, features.selector, features.ranks, features.depth) == (version, selector, 2, 2)
    assert "admin" not in json.dumps(dict(features.info)) and "admin" not in repr(features)
    check_served(features)
    with serving(version=version, depth=2, info={"speculative_algorithm": "EAGLE3"}) as fake:
        check_served(Api(fake.url, KEYS).features())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"version": "0.5.16"}, "0.5.16.*0.5.17 is the oldest"),
        ({"info": {"custom_weight_loader": []}}, "--custom-weight-loader miles_spec.sync.loader.load"),
        ({"info": {"dp_size": 2}}, "dp_size 2"),
        ({"info": {"attn_dp_size": 2}}, "attn_dp_size 2"),
        ({"info": {"enable_watermark": True}}, "enable_watermark"),
        ({"info": {"speculative_algorithm": "NGRAM"}}, "NGRAM"),
        ({"info": {"speculative_eagle_topk": 4}}, "speculative_eagle_topk 4 and must have 1"),
        ({"info": {"speculative_num_draft_tokens": 9}}, "speculative_num_draft_tokens 9"),
        ({"info": {"speculative_accept_threshold_single": 0.5}}, "threshold_single 0.5"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused(settings: dict[str, Any], says: str) -> None:
    with serving(**settings) as fake, pytest.raises(RunError, match=says):
        check_served(Api(fake.url, KEYS).features())


@pytest.mark.parametrize("keys", [Keys(), Keys(api="wrong", admin="wrong"), Keys(api="api", admin="api")])
def test_a_wrong_key_is_refused(keys: Keys) -> None:
    with serving(api_key="api", admin_key="admin") as fake:
        with pytest.raises(RunError, match="MILES_SPEC_ADMIN_KEY"):
            Api(fake.url, keys).ask("/flush_cache", {}, admin=True)
        if keys.api != "api":
            with pytest.raises(RunError, match="refuses the key"):
                Api(fake.url, keys).features()
        assert fake.refused >= 1 and not fake.paths()


def test_keys_are_random_and_hidden() -> None:
    keys = Keys.random()
    assert keys != Keys.random() and keys.api != keys.admin and len(keys.api) > 30
    assert keys.api not in repr(keys) and keys.admin not in repr(keys)


def test_joined_servers_take_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILES_SPEC_API_KEY", "one")
    monkeypatch.delenv("MILES_SPEC_ADMIN_KEY", raising=False)
    assert Keys.of_environment() == Keys(api="one", admin="one")
    monkeypatch.setenv("MILES_SPEC_ADMIN_KEY", "two")
    assert Keys.of_environment() == Keys(api="one", admin="two")


def test_statuses_mean_what_they_mean() -> None:
    refuse(200, "", "x")
    for status, error in ((401, RunError), (400, RunError), (429, ServerBusy), (503, ServerBusy), (500, ServerBusy)):
        with pytest.raises(error):
            refuse(status, "why", "x")


def test_who_is_not_there_or_late_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as fake:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked
        Api(fake.url, Keys()).ask("/model_info")
        fake.faults.late_health_s = 3.0
        with pytest.raises(TimeoutError, match="/health did not answer"):
            Api(fake.url, Keys()).call("/health", timeout_s=0.1)
        fake.faults.hang_up = 1
        with pytest.raises(ConnectionError):
            Api(fake.url, Keys()).ask("/generate", {"input_ids": [1], "sampling_params": {}})
    with pytest.raises(ConnectionError, match="not there"):
        Api(fake.url, Keys()).call("/health", timeout_s=1.0)
