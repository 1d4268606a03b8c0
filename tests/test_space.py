"""The search space: what is in it, and what is not."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import optuna
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.space import (
    MAX_BOUND,
    Choice,
    Range,
    SearchSpace,
    check_name,
    describe,
    format_value,
    parse_space,
    readable,
)
from raytune_autotuner.tune.tell import suggest

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
ANYTHING = st.one_of(JSON, st.text(max_size=20), st.floats())


@st.composite
def distributions(draw: st.DrawFn) -> dict[str, Any]:
    """A distribution as a study file holds it."""
    kind = draw(st.sampled_from(["int", "float", "choice", "bool"]))
    if kind == "bool":
        return {"bool": True}
    if kind == "choice":
        texts = st.one_of(st.text("ab1-", max_size=4), st.integers(-50, 50), st.none(), st.booleans())
        return {"choice": draw(st.lists(texts, min_size=1, max_size=5, unique_by=lambda value: (type(value), value)))}
    numbers = st.integers(-1000, 1000) if kind == "int" else st.floats(-1000, 1000)
    low, high = sorted([draw(numbers), draw(numbers)])
    how = draw(st.sampled_from(["plain", "log", "step"]))
    if how == "log":
        assume(low > 0)
        return {kind: [low, high], "log": True}
    if how == "plain":
        return {kind: [low, high]}
    step = draw(st.integers(1, 100))
    # Decimals as people write them: the sampler itself computes to 12 of them.
    return (
        {kind: [low, high], "step": step}
        if kind == "int"
        else {kind: [round(low, 3), round(high, 3)], "step": step / 100}
    )


def only(raw: Any) -> Range | Choice:
    return parse_space({"x": raw}).parameters[0].distribution


@given(distributions(), st.integers(0, 2**31))
def test_every_sampled_value_is_contained(raw: dict[str, Any], seed: int) -> None:
    space = parse_space({"x": raw})
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    value = suggest(study.ask(), space)["x"]
    assert space.parameters[0].distribution.contains(value)
    space.check_point({"x": value}, "point")


@given(distributions())
def test_the_bounds_are_contained_and_the_description_is_a_line(raw: dict[str, Any]) -> None:
    (parameter,) = parse_space({"x": raw}).parameters
    assert parameter.bounds
    assert all(parameter.distribution.contains(bound) for bound in parameter.bounds)
    assert len(describe(parameter.distribution).splitlines()) == 1


@given(distributions(), ANYTHING)
def test_any_value_is_contained_or_not_and_never_an_error(raw: dict[str, Any], value: Any) -> None:
    distribution = only(raw)
    if distribution.contains(value) and isinstance(distribution, Range):
        assert distribution.low <= value <= distribution.high


@given(st.dictionaries(st.sampled_from(["int", "float", "choice", "bool", "log", "step", "when", "x"]), ANYTHING))
def test_any_distribution_is_parsed_or_refused_by_a_config_error(raw: dict[str, Any]) -> None:
    with suppress(ConfigError):
        distribution = only(raw)
        assert distribution.size >= 1
        assert describe(distribution)


@pytest.mark.parametrize(
    ("raw", "inside", "outside"),
    [
        ({"int": [1, 9], "step": 3}, [1, 4, 7, 7.0], [2, 9, 10, 0, True, "4", 4.5, math.nan, math.inf, None]),
        ({"float": [0.5, 1.0], "step": 0.1}, [0.5, 0.6, 0.7, 1.0], [0.55, 1.1]),
        ({"float": [1, 2]}, [1, 2, 1.5], [0.999, 2.001]),
        ({"choice": [1, "a", None, {"k": [1]}]}, [1, "a", None, {"k": [1]}], [True, "1", 0, {"k": [2]}, [1]]),
        ("bool", [True, False], [1, 0, "true", None]),
    ],
)
def test_what_is_inside_and_what_is_outside(raw: Any, inside: list[Any], outside: list[Any]) -> None:
    distribution = only(raw)
    assert all(distribution.contains(value) for value in inside)
    assert not any(distribution.contains(value) for value in outside)


@pytest.mark.parametrize(
    ("raw", "size"),
    [
        ({"int": [1, 9]}, 9),
        ({"int": [1, 9], "step": 3}, 3),
        ({"float": [0, 1]}, math.inf),
        ({"float": [1, 1]}, 1),
        ({"float": [0, 1], "step": 0.25}, 5),
        ("bool", 2),
    ],
)
def test_a_distribution_knows_its_size(raw: Any, size: float) -> None:
    assert only(raw).size == size


@pytest.mark.parametrize(
    "raw",
    [
        {"int": [1]},
        {"int": [1.5, 2]},
        {"int": [True, 2]},
        {"int": [1, 10 * MAX_BOUND]},
        {"int": "1-5"},
        {"float": [0, math.inf]},
        {"float": [1, 2], "step": 0},
        {"int": [1, 2], "step": 0.5},
        {"int": [1, 8], "log": True, "step": 2},
        {"int": [1, 8], "log": "yes"},
        {"choice": "abc"},
        {"choice": [1, 2, 1]},
        {"choice": [1], "log": True},
        {"int": [1, 2], "choice": [1]},
        {"bool": False},
        {"log": True},
        [1, 2],
        None,
        {"int": [1, 2], "when": 5},
    ],
)
def test_what_is_no_distribution_is_refused(raw: Any) -> None:
    with pytest.raises(ConfigError, match=r"^search_space\.x"):
        only(raw)


@pytest.mark.parametrize("name", ["max-num-seqs", "compilation-config.cudagraph_mode", "env:VLLM_X", "O3"])
def test_flags_and_variables_are_names(name: str) -> None:
    check_name("search_space", name)


@pytest.mark.parametrize("name", ["--x", "a_b", "a b", "a=b", "env:1", "env:a-b", "", "a\nb", "é", "."])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^search_space"):
        check_name("search_space", name)


def space(**constraints: str) -> SearchSpace:
    raw = {"a": {"int": [1, 8]}, "b": {"choice": ["x", "y"], "when": "a > 4"}}
    return parse_space(raw, tuple(constraints.values()))


def test_a_setting_that_breaks_a_constraint_is_found() -> None:
    constrained = space(first="a != 3", second="a <= limit")
    assert constrained.violated({"a": 2}, {"limit": 5}) is None
    broken = constrained.violated({"a": 7}, {"limit": 5})
    assert broken is not None
    assert broken.text == "a <= limit"
    assert constrained.violated({"a": 7}, {}) is None, "a name without a value breaks nothing"


def test_a_constraint_that_some_values_cannot_be_put_into_is_found_before_the_search() -> None:
    with pytest.raises(ConfigError, match=r"constraints\[0\]: `a < b` cannot be evaluated for"):
        space(first="a < b").check_expressions({})
    space(first="a < 3 or b == 'x'").check_expressions({})


def test_a_number_in_a_range_may_be_written_without_a_point() -> None:
    (parameter,) = parse_space({"a": {"float": ["1e-3", 1], "step": "1e-3"}}).parameters
    assert parameter.distribution == Range("float", 0.001, 1, 0.001)
    with pytest.raises(ConfigError, match="'1e2' is not an integer"):
        parse_space({"a": {"int": [1, "1e2"]}})


@given(JSON)
def test_a_value_on_the_command_line_is_one_text(value: Any) -> None:
    assert isinstance(format_value(value), str)
    assert "\n" not in format_value(value)


def test_what_people_read_of_a_value_is_one_line_that_no_terminal_obeys() -> None:
    assert readable("a\x1b[2J\nb\u202ec") == r"a\x1b[2J\nb\u202ec"
    assert "\x1b" not in describe(Choice(("\x1b[2J",)))
