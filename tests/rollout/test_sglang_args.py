"""SGLang's argument list: what is set, what is refused by name, and what an installed version lacks."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import pytest

import fake_sglang
from miles_spec.rollout.sglang_args import (
    Installed,
    ServerSettings,
    arguments,
    check,
    depths,
    installed,
    version_of,
)
from miles_spec.types import RunError

SETTINGS = ServerSettings(model_path="/m", context_length=100, max_running=4, seed=7)
DRAFTING = replace(SETTINGS, draft_path="/d")
KNOWN = Installed(version="0.5.21", flags=fake_sglang.FLAGS, platforms=("cuda",))


def made(settings: ServerSettings, depth: int = 0, known: Installed = KNOWN) -> list[str]:
    return arguments(settings, depth, known, host="127.0.0.1", port=1234, by_batch="/d.json")


def value(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_a_plain_server_loads_nothing_and_does_not_speculate() -> None:
    argv = made(SETTINGS)
    assert value(argv, "--load-format") == "dummy" and value(argv, "--port") == "1234"
    assert value(argv, "--custom-weight-loader") == "miles_spec.sync.loader.load"
    assert value(argv, "--random-seed") == "7" and value(argv, "--max-running-requests") == "4"
    assert int(value(argv, "--context-length")) > 100 + 2, "SGLang keeps some of it for itself"
    assert not [a for a in argv if "specul" in a or "memory-saver" in a or "key" in a]


@pytest.mark.parametrize("depth", [1, 3, 7])
def test_a_drafting_server_verifies_one_token_more_than_it_drafts(depth: int) -> None:
    argv = made(DRAFTING, depth)
    assert value(argv, "--speculative-num-steps") == str(depth)
    assert value(argv, "--speculative-num-draft-tokens") == str(depth + 1)
    assert value(argv, "--speculative-eagle-topk") == "1"
    assert value(argv, "--speculative-draft-model-path") == "/d"
    assert "--speculative-use-rejection-sampling" not in argv and "--speculative-token-map" not in argv


def test_rule_vocabulary_and_memory_have_their_flags() -> None:
    assert "--speculative-use-rejection-sampling" in made(replace(DRAFTING, rule="rejection"), 2)
    assert value(made(replace(DRAFTING, token_map="/t.pt"), 2), "--speculative-token-map") == "/t.pt"
    assert value(made(DRAFTING, 2), "--speculative-algorithm") == "EAGLE"
    assert "--speculative-draft-load-format" not in made(DRAFTING, 2)
    own = made(replace(DRAFTING, algorithm="EAGLE3", draft_vocabulary=True), 2)
    assert value(own, "--speculative-algorithm") == "EAGLE3"
    assert value(own, "--speculative-draft-load-format") == "auto"
    argv = made(replace(DRAFTING, release=("weights", "kv_cache")), 2)
    assert {"--enable-memory-saver", "--enable-weights-cpu-backup", "--enable-draft-weights-cpu-backup"} <= set(argv)
    assert "--enable-draft-weights-cpu-backup" not in made(replace(SETTINGS, release=("weights", "kv_cache")))
    cache = made(replace(DRAFTING, release=("kv_cache",)), 2)
    assert "--enable-memory-saver" in cache and not any("backup" in flag for flag in cache)
    assert not any("saver" in flag for flag in made(DRAFTING, 2))


def test_the_users_table_comes_on_top() -> None:
    extra = {"mem-fraction-static": 0.5, "disable_radix_cache": True, "random_seed": 3, "enable_x": False}
    flags = {**fake_sglang.FLAGS, "enable_x": {"options": ["--enable-x", "--no-enable-x"], "takes": "none"}}
    argv = made(replace(SETTINGS, extra=extra), known=replace(KNOWN, flags=flags))
    assert value(argv, "--mem-fraction-static") == "0.5" and value(argv, "--random-seed") == "3"
    assert argv.count("--random-seed") == 1 and "--disable-radix-cache" in argv and "--no-enable-x" in argv


def test_prefill_graphs_are_off_unless_the_user_wants_them() -> None:
    flag = "--cuda-graph-backend-prefill"
    flags = {**fake_sglang.FLAGS, "cuda_graph_backend_prefill": {"options": [flag], "takes": "value"}}
    known = replace(KNOWN, flags=flags)
    for depth in (0, 2):
        assert value(made(DRAFTING, depth, known), flag) == "disabled"
    argv = made(replace(SETTINGS, extra={"cuda-graph-backend-prefill": "breakable"}), known=known)
    assert value(argv, flag) == "breakable" and argv.count(flag) == 1
    lacking = {k: v for k, v in fake_sglang.FLAGS.items() if k != "cuda_graph_backend_prefill"}
    assert flag not in made(SETTINGS, known=replace(KNOWN, flags=lacking))


def test_the_users_speculative_settings_wait_for_a_draft() -> None:
    settings = replace(DRAFTING, extra={"speculative_eagle_topk": 1})
    assert "--speculative-eagle-topk" not in made(settings, 0) and "--speculative-eagle-topk" in made(settings, 1)


@pytest.mark.parametrize(
    ("name", "setting", "says"),
    [
        ("host", "0.0.0.0", "fleet.host"),
        ("api-key", "k", "random"),
        ("load_format", "auto", "pushed"),
        ("custom_weight_loader", ["x.y"], "push"),
        ("speculative_num_steps", 4, "draft.num_steps"),
        ("speculative_accept_threshold_single", 0.9, "must be 1"),
        ("speculative_accept_threshold_acc", 0.5, "would not have sampled"),
        ("speculative_eagle_topk", 4, "tree"),
        ("speculative_ngram_capacity", 4, "draft.family"),
        ("speculative_adaptive", True, "draft.max_batch"),
        ("skip_tokenizer_init", True, "stop strings"),
        ("dp_size", 2, "fleet.engines"),
        ("attn_dp_size", 2, "fleet.engines"),
        ("speculative_use_block_verification", True, "rollout.verify"),
        ("enable_watermark", True, "the policy's"),
        ("watermark_config", "x.json", "the policy's"),
        ("trust_remote_code", True, "never run"),
        ("enable_memory_saver", True, "fleet.release"),
        ("config", "x.yaml", "unchecked"),
    ],
)
def test_what_is_ours_or_lossy_is_refused_by_name(name: str, setting: object, says: str) -> None:
    with pytest.raises(ValueError, match=f"sglang.{name.replace('-', '_')}.*{says}"):
        check(replace(SETTINGS, extra={name: setting}))


def test_lossy_environment_variables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check(SETTINGS)
    for name, value in (("SGLANG_SIMULATE_ACC_LEN", "3"), ("SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ValueError, match=f"{name} is set"):
                check(SETTINGS)


def test_rejection_over_a_reduced_vocabulary_is_refused() -> None:
    for reduced in (replace(DRAFTING, token_map="/t.pt"), replace(DRAFTING, algorithm="EAGLE3", draft_vocabulary=True)):
        check(reduced)
        with pytest.raises(ValueError, match=r"draft\.vocab_size"):
            check(replace(reduced, rule="rejection"))


def test_it_drafts_up_to_a_number_of_sequences() -> None:
    settings = replace(DRAFTING, max_batch=32)
    argv = made(settings, 3)
    assert "--speculative-adaptive" in argv and value(argv, "--speculative-adaptive-config") == "/d.json"
    assert json.loads(depths(3, 32)) == {"1": {"candidate_steps": [3]}, "33": {"candidate_steps": [0]}}
    assert not any("adaptive" in flag for flag in (*made(settings, 0), *made(DRAFTING, 3)))
    with pytest.raises(ValueError, match=r"draft\.max_batch = 0"):
        check(replace(settings, rule="rejection"))


def test_a_platform_that_verifies_greedily_is_refused_where_tokens_are_sampled() -> None:
    cpu = replace(KNOWN, platforms=("cpu",))
    made(replace(DRAFTING, rule="greedy"), 2, cpu)
    made(DRAFTING, 0, cpu)
    with pytest.raises(ValueError, match=r"'cpu'.*draft\.enabled"):
        made(DRAFTING, 2, cpu)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"mem_fraction_statc": 0.5}, "no argument --mem-fraction-statc; did you mean mem_fraction_static"),
        ({"disable_radix_cache": 3}, "true or false"),
        ({"mem_fraction_static": [1, 2]}, "one value"),
    ],
)
def test_a_wrong_entry_is_one_sentence(extra: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made(replace(SETTINGS, extra=extra))


def test_a_flag_that_this_version_lacks_is_named() -> None:
    old = {k: v for k, v in fake_sglang.FLAGS.items() if k != "speculative_use_rejection_sampling"}
    with pytest.raises(ValueError, match=r"SGLang 0\.5\.21 has no argument --speculative-use-rejection-sampling"):
        made(replace(DRAFTING, rule="rejection"), 2, replace(KNOWN, flags=old))


def test_versions() -> None:
    assert version_of("0.5.17") == (0, 5, 17) and version_of("0.6.0.post2") > version_of("0.5.21rc1")
    for text in ("0.5.16", "0.4.99", "unknown"):
        with pytest.raises(RunError, match=text):
            version_of(text)


def test_the_launch_command_is_asked_what_it_knows() -> None:
    known = installed(fake_sglang.COMMAND, os.environ)
    assert known.version == "0.5.21" and "model_path" in known.flags and known.platforms == ("cuda",)
    with pytest.raises(RunError, match=r"ended with status 5.*\nno such module"):
        installed((sys.executable, "-c", "print('no such module'); raise SystemExit(5)"), os.environ)
    with pytest.raises(RunError, match="cannot run /nowhere/python"):
        installed(("/nowhere/python",), os.environ)
    with pytest.raises(RunError, match=r"^\S*python\S* has no SGLang: install it there, .*or set rollout.engine = "):
        installed((sys.executable, "-c", "raise ModuleNotFoundError(\"No module named 'sglang'\")"), os.environ)
