"""A study file: what is read from it, and that whatever else it holds is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_autotuner.engine import models
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.file import load_study, parse_study
from raytune_autotuner.study.plain import dump_yaml, parse_yaml
from raytune_autotuner.study.study import Study

MINIMAL: dict[str, Any] = {"study": "s", "model": "a/b", "search_space": {"max-num-seqs": {"int": [1, 64]}}}
DURATIONS = st.one_of(st.floats(0.1, 1e6), st.sampled_from(["90s", "40m", "1h 30m", "2d", "0.5h"]))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10), st.binary(max_size=5))
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.text(max_size=8), st.integers()), inner, max_size=4),
    ),
    max_leaves=12,
)
SECTIONS = sorted(Study.model_fields)


def load(tmp_path: Path, text: str | bytes, *overrides: str) -> Study:
    path = tmp_path / "study.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_study(path, overrides)


def refusal(tmp_path: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


def test_what_is_left_out_has_its_default() -> None:
    study = parse_study(MINIMAL)
    assert study.objective.metric == "output_throughput_tok_s"
    assert study.objective.direction == "maximize"
    assert study.workload.concurrency == (8,)
    assert (study.search.trials, study.trial.timeout_s, study.penalty.grade) == (20, 600.0, "progress")
    assert (study.resources.gpus, study.engine.kind) == ("auto", "vllm")


def test_a_study_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_study(MINIMAL).study = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("40m", 2400), ("1h 30m", 5400), ("1h30m", 5400), ("2d", 172800), (7, 7), (0.5, 0.5)],
)
def test_a_duration_is_seconds_or_text(text: Any, seconds: float) -> None:
    assert parse_study({**MINIMAL, "trial": {"timeout_s": text}}).trial.timeout_s == seconds


@pytest.mark.parametrize("text", ["", "s", "5", "5 minutes", "1h x", "-5m", "1" * 500_000, True, 0, -1, [1], "0s"])
def test_what_is_no_duration_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"trial\.timeout_s: "):
        parse_study({**MINIMAL, "trial": {"timeout_s": text}})


@pytest.mark.parametrize("key", ["dataset", "trace"])
def test_a_uri_where_every_node_needs_a_path_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"workload\.{key}: takes a path .* but got 's3://bucket/file'"):
        parse_study({**MINIMAL, "workload": {key: "s3://bucket/file"}})


def test_a_trials_setting_is_the_fixed_one_with_its_parameters_over_it() -> None:
    study = parse_study(
        {**MINIMAL, "engine": {"args": {"max-num-seqs": 4, "dtype": "auto"}, "env": {"VLLM_A": 1, "VLLM_B": True}}}
    )
    assert study.fixed == {"max-num-seqs": 4, "dtype": "auto", "env:VLLM_A": "1", "env:VLLM_B": "true"}
    assert study.setting({"max-num-seqs": 9}) == {**study.fixed, "max-num-seqs": 9}
    assert study.setting({}) == study.fixed


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"engine": {"search_weights": "dummy", "args": {"speculative-config": {"method": "ngram"}}}},
            "drafted tokens",
        ),
        ({"search_space": {"speculative-config": {"choice": [{"method": "ngram"}]}}}, "drafted tokens"),
        ({"search_space": {"load-format": {"choice": ["auto"]}}}, "load-format is set"),
        ({"quality": {}}, "quality asks"),
        ({"verify": {"top": 0}}, "verify.top is 0"),
    ],
)
def test_dummy_weights_are_refused_where_they_mislead(changes: dict[str, Any], why: str) -> None:
    dummy = {"engine": {"search_weights": "dummy"}}
    assert parse_study({**MINIMAL, **dummy}).searched.setting({})["load-format"] == "dummy"
    with pytest.raises(ConfigError, match=rf"engine.search_weights: dummy: .*{why}"):
        parse_study({**MINIMAL, **dummy, **changes})


def test_the_engines_python_is_kept_in_full_unless_it_is_a_bare_name() -> None:
    def python(path: str) -> str:
        return str(parse_study({**MINIMAL, "engine": {"python": path}}).engine.python)

    assert python("venv/bin/python") == str(Path.cwd() / "venv/bin/python")
    assert python("~/bin/python") == str(Path.home() / "bin/python")
    assert python("python3.12") == "python3.12"


def test_an_override_reaches_any_key(tmp_path: Path) -> None:
    text = yaml.safe_dump(MINIMAL)
    study = load(tmp_path, text, "search.trials=3", "workload.concurrency=[1, 2]", "engine.env.VLLM_A=b", "model=c/d")
    assert (study.search.trials, study.workload.concurrency) == (3, (1, 2))
    assert (study.engine.env, study.model) == ({"VLLM_A": "b"}, "c/d")


def test_a_point_may_hold_the_value_that_is_fixed_for_the_baseline() -> None:
    raw = {**MINIMAL, "engine": {"args": {"max-num-seqs": 4}}, "search": {"points": [{"max-num-seqs": 4}]}}
    assert parse_study(raw).search.points == ({"max-num-seqs": 4},)


@pytest.mark.parametrize("key", ["x[", "a]", "[", ".", "..", "search.[", "a.b]c", "[0]", "a[0"])
def test_a_key_of_brackets_and_dots_is_refused_like_any_other(tmp_path: Path, key: str) -> None:
    assert f"unknown key {key!r} in the study" in refusal(tmp_path, yaml.safe_dump({**MINIMAL, key: 1}))
    assert refusal(tmp_path, yaml.safe_dump(MINIMAL), f"{key}=1")


def test_all_wrong_keys_are_told_at_once_up_to_three(tmp_path: Path) -> None:
    raw = {**MINIMAL, "search": {"trials": "a", "seed": "b", "sampler": "c"}, "trial": {"retries": -1}}
    lines = refusal(tmp_path, yaml.safe_dump(raw)).splitlines()
    assert len(lines) == 3
    assert all(": search." in line for line in lines)


BOMB = [f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
HOSTILE: dict[str, str | bytes] = {
    "alias bomb of mappings": "a: &a {x: 1}\nb: &b {p: *a, q: *a}\nc: {p: *b, q: *b}\n",
    "alias bomb of lists": "\n".join(["a: &a [x, x, x, x, x, x, x, x, x]", *BOMB]),
    "alias to itself": "study: &a [*a]",
    "merge key": "study: s\n<<: {model: m}\n",
    "python object": "study: !!python/object/apply:os.system ['true']\n",
    "set": "study: !!set {a, b}\n",
    "bad tag": "study: !!int ''\n",
    "deep lists": "study: " + "[" * 100_000,
    "deep mappings": "study: " + "{a: " * 5_000,
    "deep blocks": "\n".join(" " * depth + "a:" for depth in range(500)),
    "key of a list": "? [a, b]\n: c\n",
    "key of a number": "1: 2\n",
    "key twice, written differently": "study: s\n'study': t\n",
    "huge integer": "study: " + "9" * 10_000 + "\n",
    "huge hexadecimal integer": "study: 0x" + "f" * 10_000 + "\n",
    "impossible date": "study: 2026-99-99\n",
    "control characters": "study: a\x00b\n",
    "escaped zero": 'model: "a\\0b"\nstudy: s\nsearch_space: {a: bool}\n',
    "lone surrogate": 'model: "\\ud800"\nstudy: s\nsearch_space: {a: bool}\n',
    "two documents": "study: s\n---\nstudy: t\n",
    "tabs": "study:\n\t- a\n",
    "unclosed": "study: 'a\n",
    "byte order mark of UTF-16": b"\xff\xfes\x00t\x00",
}


@pytest.mark.parametrize(
    ("limit", "right"),
    [("{ttft_ms: 500}", "ttft_ms: {p90: 500}"), ("{tpot_ms_p99: 50.5}", "tpot_ms: {p99: 50.5}")],
)
def test_a_limit_without_its_statistic_is_told_where_to_stand(tmp_path: Path, limit: str, right: str) -> None:
    assert f"write {right}." in refusal(tmp_path, yaml.safe_dump(MINIMAL), f"objective.slo={limit}")


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_yaml_is_refused_in_a_few_short_lines(tmp_path: Path, case: str) -> None:
    message = refusal(tmp_path, HOSTILE[case])
    assert len(message.splitlines()) <= 3
    assert len(message) < 600
    assert "study.yaml" in message


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "2026-01-01", "0x" + "f" * 20])
@pytest.mark.parametrize("key", ["search.seed", "engine.args.x", "search_space.x.choice", "objective.slo.ttft_ms.p90"])
def test_what_json_could_not_hold_is_refused_wherever_it_stands(tmp_path: Path, key: str, value: str) -> None:
    listed = f"[{value}]" if key.endswith("choice") else value
    assert f"{key}" in refusal(tmp_path, yaml.safe_dump(MINIMAL), f"{key}={listed}")


@given(st.binary(max_size=200))
def test_bytes_are_a_study_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    assert refusal(tmp_path_factory.getbasetemp(), content)


@given(st.text(alphabet="abstudymel:{}[]-&*!?|>'\"%@,#\n 01", max_size=60))
def test_text_that_looks_like_yaml_is_a_study_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, content: str
) -> None:
    assert refusal(tmp_path_factory.getbasetemp(), content)


def assert_taken_or_refused(read: Callable[[], object]) -> None:
    """Nothing but a `ConfigError` of a few short lines comes out of `read`, if anything does."""
    refused = ""
    try:
        read()
    except ConfigError as error:
        refused = str(error)
    lines = refused.splitlines()
    assert len(lines) <= 3
    assert all(len(line) < 500 for line in lines)


@given(st.sampled_from(SECTIONS), TREES)
def test_any_values_in_a_section_are_taken_or_refused_by_a_config_error(section: str, value: Any) -> None:
    assert_taken_or_refused(lambda: parse_study({**MINIMAL, section: value}))


@given(st.text(max_size=40), TREES)
def test_any_override_is_taken_or_refused_by_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    text = yaml.safe_dump(MINIMAL)
    folder = tmp_path_factory.getbasetemp()
    assert_taken_or_refused(lambda: load(folder, text, f"{key}={value!r}", f"engine.args.x={value!r}"))


@st.composite
def studies(draw: st.DrawFn) -> Study:
    """Studies with something in every section."""
    loop = draw(st.sampled_from(["concurrency", "request_rate_rps"]))
    levels = draw(st.lists(st.integers(1, 500), min_size=1, max_size=3))
    raw = {
        "study": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
        "model": f"m{draw(st.text(st.characters(exclude_categories=['C']), max_size=20))}",
        "engine": {
            "kind": draw(st.sampled_from(["vllm", "simulated"])),
            "args": {"dtype": draw(st.sampled_from(["auto", "yes", "1e5", "null", ""])), "flag": draw(st.booleans())},
            "env": draw(
                st.dictionaries(st.from_regex(r"VLLM_X[A-Z]{1,8}", fullmatch=True), st.text("abc 1:#", max_size=8))
            ),
        },
        "search_space": {
            "max-num-seqs": {"int": [1, draw(st.integers(1, 10**9))], "log": draw(st.booleans())},
            "mode": {"choice": [1, 1.5, "1", None, True, {"level": [1, "a"]}], "when": "max-num-seqs > 3"},
            "env:OMP_THREADS": {"choice": ["auto", "0-1", "0x1F", "on"]},
        },
        "constraints": draw(st.lists(st.sampled_from(["max-num-seqs != 7", 'dtype != "other" or flag']), max_size=2)),
        "workload": {loop: levels, "traffic": draw(st.sampled_from(["D(8,2)", "N(8,2)/(4,1)", "U(1,9)/(2,3)"]))},
        "objective": {"minimize": "ttft_ms_p90", "slo": {"ttft_ms": {"p99": draw(st.floats(0.001, 1e9))}}},
        "search": {"time_budget": draw(DURATIONS), "points": [{"max-num-seqs": 1, "mode": {"level": [1, "a"]}}]},
        "trial": {"timeout_s": draw(DURATIONS)},
        "resources": {"gpus": draw(st.sampled_from(["auto", 0, 0.5, 2]))},
    }
    return parse_study(raw)


@settings(max_examples=50)
@given(studies())
def test_a_study_that_is_written_down_is_read_as_the_same(
    tmp_path_factory: pytest.TempPathFactory, study: Study
) -> None:
    text = yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    assert load(tmp_path_factory.getbasetemp(), text) == study


@pytest.mark.parametrize("text", ["\x85", "a\x85b", "\u2028", "a\r\nb", "\ufeff", " a ", "no", "1e3", "ä\t"])
def test_a_text_is_read_as_it_was_written(text: str) -> None:
    assert parse_yaml(dump_yaml({"a": [text]}), "a file")[0] == {"a": [text]}


@pytest.mark.parametrize(
    ("written", "distribution", "value"),
    [
        (2, {"choice": [1, 2, 4]}, 2),
        (8, {"choice": [1, 2, 4]}, 8),
        ("2", {"choice": ["2", 2]}, "2"),
        (True, {"choice": [True, "auto"]}, True),
        ("null", {"choice": [None, "auto"]}, "null"),
        ("007", {"choice": [7, 8]}, "007"),
        (3, {"int": [1, 8]}, 3),
        (3, {"float": [1, 8]}, 3.0),
        ("auto", {"int": [1, 8]}, "auto"),
    ],
)
def test_a_fixed_variable_that_is_searched_too_has_a_value_of_the_space(
    written: Any, distribution: Any, value: Any
) -> None:
    engine = {"trust_code": True, "env": {"X": written, "Y": 2}}
    study = parse_study({**MINIMAL, "engine": engine, "search_space": {"env:X": distribution}})
    fixed = study.fixed
    assert fixed == {"env:X": value, "env:Y": "2"}
    assert type(fixed["env:X"]) is type(value)


def test_a_constraint_may_compute_with_a_fixed_variable_that_is_searched_too() -> None:
    space = {"env:X": {"choice": [1, 2, 4]}}
    engine = {"trust_code": True, "env": {"X": 2}}
    parse_study({**MINIMAL, "engine": engine, "search_space": space, "constraints": ["env:X * 2 <= 8"]})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: ~no-such-user/x", "no such home folder"),
        ("model: a/b\nengine: {python: ~no-such-user/bin/python}", "engine.python: .*no such home folder"),
        ("model: a/b\nworkload: {dataset: ~no-such-user/x, concurrency: 1}", "workload.dataset: .*no such home folder"),
        ("model: a/b\nspace: ~no-such-user/x", "space: .*no such home folder"),
        (f"model: a/b\nspace: {'x' * 300}", "neither a file nor shipped"),
        ("model: a/b\nspace: vllm-cpu\nconstraints: 5", "constraints: should be a valid tuple, but got 5"),
        ("model: a/b\nspace: vllm-cpu\nconstraints: a < 4", "constraints: should be a valid tuple, but got 'a < 4'"),
        ("model: a/b\nsearch_space: {f: {float: [0, 1], step: 1.0e-320}}", "makes more than 1e.15 values"),
        ("model: a/b\nengine: {kind: running, base_url: 'http://h:80a0'}", "engine.base_url: Port could not be"),
        ("model: a/b\nengine: {kind: running, base_url: 'http://[::1'}", "engine.base_url: Invalid IPv6 URL"),
    ],
)
def test_bad_input_is_refused_in_words(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(f"study: s\n{text}\n")
    with pytest.raises(ConfigError, match=told):
        models.check(load_study(path).model)
