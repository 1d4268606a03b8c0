"""The search space: which parameters, over which distributions, under which conditions.

A parameter is an engine flag without its dashes (`max-num-seqs`) or `env:NAME`, an environment variable of the
engine. Pure data: samplers live in `tune/`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

from raytune_autotuner.study.errors import ConfigError, printable, shown
from raytune_autotuner.study.expressions import Expression, parse_expression

Params: TypeAlias = Mapping[str, Any]
"""A setting: parameter name to value. Empty for the baseline."""

_MAX_DESCRIBED = 20
_KINDS = ("int", "float", "choice", "bool")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_MAX_NUMBER_CHARACTERS = 40
_NAME = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*|[A-Za-z0-9][A-Za-z0-9-]*(\.[A-Za-z0-9_.-]+)?")
MAX_BOUND = 10**15
"""Of a range: whole numbers up to it are exact as floats too, which is what samplers compute with."""


def _distribution(kind: str, value: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    properties = {kind: value, **more}
    return {"type": "object", "properties": properties, "required": [kind], "additionalProperties": False}


_PAIR = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
_WHEN = {"when": {"type": "string", "description": "The condition under which the parameter exists."}}
_RANGE = {"log": {"type": "boolean"}, "step": {"type": "number", "exclusiveMinimum": 0}, **_WHEN}
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": {
        "anyOf": [
            {"enum": ["bool", None]},
            _distribution("int", _PAIR, _RANGE),
            _distribution("float", _PAIR, _RANGE),
            _distribution("choice", {"type": "array", "minItems": 1}, _WHEN),
            _distribution("bool", {"const": True}, _WHEN),
        ]
    },
}
"""Of `search_space:`, for editors; `null` leaves a parameter of a ready-made space out."""
# Settings for which an expression is tried before a study starts.
_MAX_TRIED = 10_000


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `step` and `log` exclude each other."""

    type: Literal["int", "float"]
    low: float
    high: float
    step: float | None = None
    log: bool = False

    @property
    def size(self) -> float:
        """How many values there are; infinite for a float range without a step."""
        if self.type == "float" and self.step is None:
            return math.inf if self.high > self.low else 1
        return math.floor((self.high - self.low) / (self.step or 1) + 1e-9) + 1

    @property
    def ends(self) -> tuple[float, float]:
        """`low` and the highest value that may be suggested: with a step, that may be below `high`."""
        return self.low, self.high if self.step is None else min(self.high, self.low + (self.size - 1) * self.step)

    def contains(self, value: Any) -> bool:
        """Whether `value` may be suggested."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if not self.low <= value <= self.high:
            return False
        if self.type == "int" and value != int(value):
            return False
        steps = (value - self.low) / self.step if self.step else 0.0
        return math.isclose(steps, round(steps), abs_tol=1e-9)

    def meant(self, text: str) -> Any:
        """The number that `text`, the value of an environment variable, stands for."""
        number = _number_or_text(text)
        return float(number) if self.type == "float" and isinstance(number, int) else number


@dataclass(frozen=True)
class Choice:
    """One of `values`; JSON values (mappings, lists) are allowed."""

    values: tuple[Any, ...]

    @property
    def size(self) -> float:
        """How many values there are."""
        return len(self.values)

    @property
    def ordered(self) -> bool:
        """Whether all values are numbers, so that neighbours are alike."""
        return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in self.values)

    def contains(self, value: Any) -> bool:
        """Whether `value` may be suggested (`1` is not `true`)."""
        return any(_key(value) == _key(known) for known in self.values)

    def meant(self, text: str) -> Any:
        """The value that `text`, the value of an environment variable, stands for; a number among numbers."""
        if text in self.values:
            return text
        read = _number_or_text(text) if self.ordered else text
        return next((v for v in self.values if v is not None and (v == read or format_value(v) == text)), read)


@dataclass(frozen=True)
class Parameter:
    """A named distribution, existing only where `when` holds."""

    name: str
    distribution: Range | Choice
    when: Expression | None = None

    @property
    def bounds(self) -> list[Any]:
        """What stands for all of its values in a check: those of a choice, the two ends of a range."""
        if isinstance(self.distribution, Choice):
            return list(self.distribution.values)
        number = int if self.distribution.type == "int" else float
        return list(dict.fromkeys(number(end) for end in self.distribution.ends))


@dataclass(frozen=True)
class SearchSpace:
    """All parameters of a study, in the order of the file, with the constraints between them."""

    parameters: tuple[Parameter, ...]
    constraints: tuple[Expression, ...] = ()

    @cached_property
    def by_name(self) -> dict[str, Parameter]:
        """The parameters by name."""
        return {parameter.name: parameter for parameter in self.parameters}

    @property
    def size(self) -> float:
        """Number of settings before constraints and conditions; may be infinite."""
        return math.prod(parameter.distribution.size for parameter in self.parameters)

    @property
    def conditional(self) -> bool:
        """Whether a parameter exists only under a condition."""
        return any(parameter.when is not None for parameter in self.parameters)

    def violated(self, params: Params, fixed: Params) -> Expression | None:
        """The first constraint that `params` over the `fixed` arguments breaks, or None."""
        values = {**fixed, **params}
        return next((constraint for constraint in self.constraints if not constraint.holds(values)), None)

    def check_expressions(self, fixed: Params) -> None:
        """Raise `ConfigError` where a condition names what does not exist, or cannot be evaluated for some values."""
        known = set(self.by_name) | set(fixed)
        conditions = [(f"search_space.{p.name}.when", p.when) for p in self.parameters if p.when]
        constraints = [(f"constraints[{index}]", constraint) for index, constraint in enumerate(self.constraints)]
        for where, expression in conditions + constraints:
            for name in sorted(expression.names - known):
                raise ConfigError(
                    f"{where}: `{expression.text:.100}` names {shown(name)}, which is neither in search_space nor in "
                    "engine.args."
                )
            for values in itertools.islice(self._samples(expression, fixed), _MAX_TRIED):
                try:
                    expression.check(values)
                except ConfigError as error:
                    raise ConfigError(f"{where}: {error}") from error

    def _samples(self, expression: Expression, fixed: Params) -> Iterator[dict[str, Any]]:
        """Values for the names of `expression`: fixed ones, and the bounds of parameters in all combinations."""
        names = sorted(expression.names)
        options = [
            ([fixed[name]] if name in fixed else []) + (self.by_name[name].bounds if name in self.by_name else [])
            for name in names
        ]
        return (dict(zip(names, values, strict=True)) for values in itertools.product(*options))

    def check_point(self, point: Params, where: str) -> None:
        """Raise `ConfigError` where `point` has a name or a value outside the space."""
        for name, value in point.items():
            if name not in self.by_name:
                known = ", ".join(itertools.islice(self.by_name, 10))
                raise ConfigError(f"{where}: {shown(name)} is not in search_space ({known}).")
            distribution = self.by_name[name].distribution
            if not distribution.contains(value):
                raise ConfigError(f"{where}: {name}: {shown(value)} is not in {describe(distribution)}.")


def describe(distribution: Range | Choice) -> str:
    """One line for people.

    >>> describe(Range("int", 1, 64, log=True))
    'int 1 to 64, log'
    """
    if isinstance(distribution, Choice):
        more = ", …" if len(distribution.values) > _MAX_DESCRIBED else ""
        return "choice of " + ", ".join(readable(value) for value in distribution.values[:_MAX_DESCRIBED]) + more
    low, high = (format_value(_typed(distribution, bound)) for bound in (distribution.low, distribution.high))
    extras = [f"step {format_value(distribution.step)}"] if distribution.step else []
    extras += ["log"] if distribution.log else []
    return ", ".join([f"{distribution.type} {low} to {high}", *extras])


def format_value(value: Any) -> str:
    """A value as it stands on an engine's command line: JSON for mappings and lists, `true` for True."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return json.dumps(value, sort_keys=True)


def readable(value: Any) -> str:
    """A value as people read it: on one line, with nothing in it that a terminal would obey."""
    return printable(format_value(value))


def changes(params: Params, fixed: Params) -> dict[str, Any]:
    """The parameters of a setting that differ from the baseline's arguments."""
    return {name: value for name, value in params.items() if name not in fixed or fixed[name] != value}


def setting_key(params: Params) -> str:
    """The same text for the same setting, whatever the order of its parameters."""
    return json.dumps(params, sort_keys=True, default=str)


def parse_space(raw: Mapping[str, Any], constraints: Sequence[str] = ()) -> SearchSpace:
    """The search space of a study file's `search_space:` and `constraints:`; raises `ConfigError`."""
    return SearchSpace(
        tuple(_parameter(str(name), value) for name, value in raw.items()),
        tuple(_expression(f"constraints[{index}]", text) for index, text in enumerate(constraints)),
    )


def check_name(section: str, name: str) -> None:
    """Raise `ConfigError` where `name` is neither a flag without its dashes nor `env:NAME`; `section` holds it."""
    bare = name.lstrip("-")
    if name != bare:
        raise ConfigError(f"{section}.{name}: write the flag without dashes: {shown(bare)}.")
    head, dot, rest = name.partition(".")
    if not name.startswith("env:") and "_" in head:
        raise ConfigError(f"{section}.{name}: flags have hyphens: write {shown(head.replace('_', '-') + dot + rest)}.")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{section}: {shown(name)} is neither a flag such as max-num-seqs nor env:NAME.")


def _expression(where: str, text: Any) -> Expression:
    if not isinstance(text, str):
        raise ConfigError(f"{where}: a condition is text such as `block-size > 16`, but got {shown(text)}.")
    try:
        return parse_expression(text)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _parameter(name: str, raw: Any) -> Parameter:
    check_name("search_space", name)
    where = f"search_space.{name}"
    if raw == "bool":
        raw = {"bool": True}
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"{where}: {shown(raw)} is not a distribution. Write {{int: [1, 64]}}, {{float: [0.5, 0.9]}}, "
            f"{{choice: [a, b]}} or bool."
        )
    kinds = [kind for kind in _KINDS if kind in raw]
    if len(kinds) != 1:
        raise ConfigError(f"{where}: exactly one of {', '.join(_KINDS)} is needed, but got {shown(list(raw))}.")
    kind = kinds[0]
    allowed = {kind, "when"} | ({"log", "step"} if kind in {"int", "float"} else set())
    if unknown := sorted(str(key) for key in raw if key not in allowed):
        raise ConfigError(f"{where}: unknown key {shown(unknown[0])}; {kind} takes {', '.join(sorted(allowed))}.")
    when = None if raw.get("when") is None else _expression(f"{where}.when", raw["when"])
    if kind == "bool":
        if raw["bool"] is not True:
            raise ConfigError(f"{where}: write {name}: bool, but got bool: {shown(raw['bool'])}.")
        return Parameter(name, Choice((False, True)), when)
    distribution = _choice(where, raw["choice"]) if kind == "choice" else _range(where, kind, raw)
    return Parameter(name, distribution, when)


def _choice(where: str, values: Any) -> Choice:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ConfigError(f"{where}: choice takes a list of at least one value, but got {shown(values)}.")
    keys = [_key(value) for value in values]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise ConfigError(f"{where}: {shown(values[index])} stands twice in choice.")
    return Choice(tuple(values))


def _range(where: str, kind: Any, raw: Mapping[str, Any]) -> Range:
    bounds = raw[kind]
    if not isinstance(bounds, Sequence) or isinstance(bounds, str) or len(bounds) != 2:
        raise ConfigError(f"{where}: {kind} takes [low, high], but got {shown(bounds)}.")
    step, log = raw.get("step"), raw.get("log", False)
    if kind == "float":  # YAML 1.1 reads 1e-3, without a point, as text
        bounds, step = [_number_or_text(bound) for bound in bounds], _number_or_text(step)
    wanted = "an integer" if kind == "int" else "a number"
    for bound in bounds:
        wrong = isinstance(bound, bool) or not isinstance(bound, int if kind == "int" else (int, float))
        if wrong or not -MAX_BOUND <= bound <= MAX_BOUND:
            raise ConfigError(f"{where}: {shown(bound)} is not {wanted} of at most {MAX_BOUND:g}.")
    low, high = bounds
    if low > high:
        raise ConfigError(f"{where}: `low <= high` must hold, but got (low={low}, high={high}).")
    if not isinstance(log, bool):
        raise ConfigError(f"{where}: log is true or false, but got {shown(log)}.")
    if log and low <= 0:
        raise ConfigError(f"{where}: a log range needs `low > 0`, but got {low}.")
    if step is not None:
        numeric = isinstance(step, int if kind == "int" else (int, float)) and not isinstance(step, bool)
        if not numeric or not 0 < step <= MAX_BOUND or log:
            raise ConfigError(f"{where}: step is a number above 0 and not together with log, but got {shown(step)}.")
        if (high - low) / step > MAX_BOUND:
            raise ConfigError(f"{where}: step {step} makes more than {MAX_BOUND:g} values; write a larger one.")
    return Range(kind, low, high, step, log)


def _number_or_text(value: Any) -> Any:
    """The number that a text is written as; `value` itself where it is no text, or one such as `007` or `fast`."""
    if not isinstance(value, str) or len(value) > _MAX_NUMBER_CHARACTERS or not _NUMBER.fullmatch(value):
        return value
    number = int(value) if value.removeprefix("-").isdecimal() else float(value)
    return number if math.isfinite(number) else value


def _typed(distribution: Range, bound: float) -> float:
    return int(bound) if distribution.type == "int" else bound


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
