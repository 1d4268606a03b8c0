"""Constraints and conditions between parameters: a small, safe expression language.

    max-num-batched-tokens >= max-num-seqs
    speculative-config != null and (block-size in [16, 32] or not enforce-eager)

Names are flag names with their hyphens (so a minus wants spaces around it) or `env:NAME`. There are numbers,
strings in quotes, true, false, null, lists, `and or not`, comparisons, `in`, `+ - * / %` and parentheses: nothing
else, no calls, and nothing of Python is ever evaluated.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raytune_autotuner.study.errors import ConfigError, shown

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)
      | (?P<string>"[^"]*"|'[^']*')
      | (?P<name>(?:env:)?[A-Za-z_][A-Za-z0-9_.]*(?:-[A-Za-z0-9_.]+)*)
      | (?P<op><=|>=|==|!=|[<>()\[\],+\-*/%])
    )""",
    re.VERBOSE,
)
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
    "in": lambda left, right: left in right,
}
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "%": operator.mod,
}
_LITERALS = {"true": True, "false": False, "null": None}
_KEYWORDS = {"and", "or", "not", "in", *_LITERALS}
_MAX_DEPTH = 40
_MAX_CHARACTERS = 1_000

_Evaluator = Callable[[Mapping[str, Any]], Any]


class MissingName(Exception):
    """A name of the expression has no value in this setting."""


@dataclass(frozen=True)
class Expression:
    """A parsed expression over the values of a setting."""

    text: str
    names: frozenset[str]
    _evaluate: _Evaluator

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it is true for `values`; also where one of its names has no value, but not where it divides by 0.

        Raises `ConfigError` where the values cannot be compared, such as a string with a number.
        """
        try:
            return bool(self._evaluate(values))
        except MissingName:
            return True
        except ArithmeticError:
            return False
        except TypeError as error:
            raise self._unfit(values, error) from error

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise `ConfigError` where it cannot be evaluated for `values`, as for a division by 0."""
        try:
            self._evaluate(values)
        except MissingName:
            return
        except (TypeError, ArithmeticError) as error:
            raise self._unfit(values, error) from error

    def _unfit(self, values: Mapping[str, Any], error: Exception) -> ConfigError:
        given = {name: values[name] for name in sorted(self.names) if name in values}
        return ConfigError(f"`{self.text:.100}` cannot be evaluated for {shown(given)}: {error}.")


def parse_expression(text: str) -> Expression:
    """Parse `text`; raises `ConfigError` that names the place of the first error."""
    if len(text) > _MAX_CHARACTERS:
        raise ConfigError(f"{shown(text)} is longer than {_MAX_CHARACTERS:,} characters; split it into several.")
    return _Parser(" ".join(text.split())).parse()


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            rest = shown(text[position:].strip())
            raise ConfigError(
                f"cannot read `{text:.100}` at {rest}: expected a name, a number, a string or an operator."
            )
        kind = match.lastgroup
        value = match.group(kind)
        if kind == "name" and value in _KEYWORDS:
            kind = "op" if value not in _LITERALS else "literal"
        yield kind, value, match.start(match.lastgroup)
        position = match.end()
    yield "end", "", len(text)


class _Parser:
    """Recursive descent, one method per level of precedence."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(_tokens(text))
        self._index = 0
        self._depth = 0
        self._names: set[str] = set()

    def parse(self) -> Expression:
        evaluate = self._or()
        kind, value, _ = self._tokens[self._index]
        if kind != "end":
            raise self._error(f"unexpected {value!r}")
        return Expression(self._text, frozenset(self._names), evaluate)

    def _error(self, why: str) -> ConfigError:
        return ConfigError(f"cannot read `{self._text:.100}` at character {self._tokens[self._index][2] + 1}: {why}.")

    def _accept(self, *values: str) -> str | None:
        kind, value, _ = self._tokens[self._index]
        if kind == "op" and value in values:
            self._index += 1
            return value
        return None

    def _expect(self, value: str) -> None:
        if self._accept(value) is None:
            raise self._error(f"expected {value!r}")

    def _or(self) -> _Evaluator:
        terms = [self._and()]
        while self._accept("or"):
            terms.append(self._and())
        return terms[0] if len(terms) == 1 else lambda values: any(term(values) for term in terms)

    def _and(self) -> _Evaluator:
        terms = [self._not()]
        while self._accept("and"):
            terms.append(self._not())
        return terms[0] if len(terms) == 1 else lambda values: all(term(values) for term in terms)

    def _not(self) -> _Evaluator:
        negations = 0
        while self._accept("not"):
            negations += 1
        term = self._comparison()
        if negations == 0:
            return term
        return (lambda values: not term(values)) if negations % 2 else (lambda values: bool(term(values)))

    def _comparison(self) -> _Evaluator:
        left = self._sum()
        name = self._accept(*_COMPARISONS)
        if name is None:
            return left
        right, compare = self._sum(), _COMPARISONS[name]
        return lambda values: compare(left(values), right(values))

    def _sum(self) -> _Evaluator:
        return self._chain(self._product, "+", "-")

    def _product(self) -> _Evaluator:
        return self._chain(self._atom, "*", "/", "%")

    def _chain(self, operand: Callable[[], _Evaluator], *operators: str) -> _Evaluator:
        left = operand()
        while name := self._accept(*operators):
            left = _apply(_ARITHMETIC[name], left, operand())
        return left

    def _atom(self) -> _Evaluator:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._error("nested too deeply")
        atom = self._inner()
        self._depth -= 1
        return atom

    def _inner(self) -> _Evaluator:
        if self._accept("("):
            inner = self._or()
            self._expect(")")
            return inner
        if self._accept("["):
            return self._list()
        if self._accept("-"):
            negated = self._atom()
            return lambda values: -_number(negated(values))
        kind, value, _ = self._tokens[self._index]
        if kind not in {"number", "string", "literal", "name"}:
            raise self._error("expected a name or a value")
        self._index += 1
        return self._leaf(kind, value)

    def _leaf(self, kind: str, value: str) -> _Evaluator:
        if kind == "name":
            self._names.add(value)
            return lambda values: _look_up(values, value)
        constant = _LITERALS[value] if kind == "literal" else value[1:-1] if kind == "string" else _read_number(value)
        return lambda values: constant

    def _list(self) -> _Evaluator:
        items: list[_Evaluator] = []
        while not self._accept("]"):
            items.append(self._sum())
            if not self._accept(","):
                self._expect("]")
                break
        return lambda values: [item(values) for item in items]


def _apply(function: Callable[[Any, Any], Any], left: _Evaluator, right: _Evaluator) -> _Evaluator:
    return lambda values: function(_number(left(values)), _number(right(values)))


def _number(value: Any) -> int | float:
    """`value` if it can be computed with: Python would also multiply strings and lists, to any length."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{shown(value)} is not a number")
    return value


def _read_number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def _look_up(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise MissingName(name)
    return values[name]
