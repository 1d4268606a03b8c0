"""Constraints and conditions: a language that computes little, and nothing else."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.expressions import parse_expression

VALUES = {"a": 4, "b": 2.5, "max-num-seqs": 64, "mode": "fast", "on": True, "nothing": None, "env:X": "0-1", "x.y": 1}
OTHERS = "unknown 1 2.5 0 1e3 'fast' true null ( ) [ ] , and or not in < <= == != + - * / % = ** __import__ lambda : ."
WORDS = st.sampled_from([*VALUES, *OTHERS.split(), "  ", "' '"])


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("a == 4", True),
        ("max-num-seqs >= 8 * 8", True),
        ("max-num-seqs - 60 == a", True),
        ("a + 2 * 3 == 10", True),
        ("(a + 2) * 3 == 18", True),
        ("7 % a == 3 and 10 / a == b", True),
        ("-a < 0", True),
        ("- - a == 4", True),
        ("not a > 4", True),
        ("not not a", True),
        ("a > 4 or on", True),
        ("a > 4 and unknown", False),
        ("mode in ['slow', \"fast\"]", True),
        ("mode == 'FAST'", False),
        ("nothing == null", True),
        ("mode != null and (a in [1, 2] or not on)", False),
        ("env:X == '0-1'", True),
        ("x.y == 1", True),
        ("a in []", False),
        ("on == true", True),
        ("a\n  ==\n  4", True),
        ("unknown > 5", True),
        ("a > 4 or unknown > 5", True),
    ],
)
def test_an_expression_means_what_it_says(text: str, holds: bool) -> None:
    assert parse_expression(text).holds(VALUES) is holds


def test_an_expression_knows_its_names() -> None:
    assert parse_expression("a-b >= env:X + 1 and not c.d in [e, 'f']").names == {"a-b", "env:X", "c.d", "e"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a >",
        "a b",
        "a = 1",
        "(a",
        "a)",
        "[a",
        "a, b",
        "a < b < 3",
        "a and",
        "not",
        "'open",
        "f(a)",
        "a[0]",
        "a ** 2",
        "a; b",
        "$a",
        "(" * 5_000,
        "[" * 900,
        "- " * 400 + "a",
        "not " * 5_000,
        "a" * 100_000,
        "1" * 5_000,
        "a + " * 5_000 + "a",
    ],
)
def test_what_is_no_expression_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_expression(text)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text",
    [
        "mode > 4",
        "nothing + 1 > 2",
        "a / (a - 4) > 1",
        "a % 0.0 > 1",
        "a in a",
        "a < nothing",
        "mode * 1000000000000 == 1",
        "[1] * 10 == 1",
        "mode % 3 == 1",
        "-mode == 1",
        "on + on == 2",
    ],
)
def test_what_cannot_be_computed_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be evaluated for"):
        parse_expression(text).check(VALUES)


@pytest.mark.parametrize("text", ["a / (a - 4) > 1", "a % 0.0 > 1", "not 1 / (a - 4) > 1"])
def test_what_divides_by_zero_in_the_search_does_not_hold(text: str) -> None:
    assert not parse_expression(text).holds(VALUES)


def test_a_long_chain_within_the_limit_can_be_computed() -> None:
    assert parse_expression(" + ".join(["1"] * 240) + " == 240").holds({})
    assert parse_expression("(" * 30 + "a" + ")" * 30 + " == 4").holds(VALUES)


@given(st.one_of(st.text(max_size=80), st.lists(WORDS, max_size=30).map(" ".join), st.lists(WORDS).map("".join)))
def test_any_text_is_an_expression_or_a_config_error_and_nothing_else(text: str) -> None:
    with suppress(ConfigError):
        assert isinstance(parse_expression(text).holds(VALUES), bool)
