"""A study as asked for: the study file as frozen pydantic models.

`load_study` reads a YAML file (and `--set` overrides) into a `Study`; whatever is wrong with it is a `ConfigError`
that names file, line, key, value and what would be right.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.space import Params, SearchSpace, parse_space

MAX_STUDY_BYTES = 1_000_000
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TRAFFIC = re.compile(
    r"D\(\s*\d+\s*,\s*\d+\s*\)"
    r"|[NU]\(\s*\d+\s*,\s*\d+\s*\)\s*/\s*\(\s*\d+\s*,\s*\d+\s*\)"
)
# Arguments that the autotuner itself gives to the engine.
_RESERVED_ARGS = {"host", "port", "model", "served-model-name", "config", "api-key", "uds"}


def _parse_duration(value: Any) -> Any:
    """Seconds from a number or from text such as `40m`, `1h 30m`, `90s`."""
    if not isinstance(value, str):
        return value
    parts = _DURATION.findall(value)
    if not parts or _DURATION.sub("", value).strip():
        raise ValueError("a duration is a number of seconds or text such as 90s, 40m, 1h 30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def _as_list(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


Duration = Annotated[float, BeforeValidator(_parse_duration), Field(gt=0)]
"""Seconds; in the file a number or text such as `40m`."""
Positive = Annotated[int, Field(ge=1)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class EngineSpec(_Model):
    """Which engine, with which fixed arguments."""

    kind: Literal["vllm", "simulated"] = "vllm"
    args: dict[str, Any] = {}
    """Fixed arguments of every trial, the baseline too: flag names without dashes."""
    env: dict[str, str] = {}
    """Environment variables of the engine."""
    python: Path | None = None
    """The Python that has the engine in it; None: the one that runs the study."""

    @field_validator("env", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in value.items()}
        return value

    @field_validator("args")
    @classmethod
    def _own_args(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name.startswith("-"):
                raise ValueError(f"write the flag without dashes: {name.lstrip('-')!r}")
            if name in _RESERVED_ARGS:
                raise ValueError(f"{name!r} is set by the autotuner itself; leave it out")
        return value


class Workload(_Model):
    """The load that every trial is measured under."""

    traffic: str = "D(128,32)"
    """`D(in,out)` fixed, `N(mean,sd)/(mean,sd)` normal, `U(min,max)/(min,max)` uniform token counts."""
    concurrency: Annotated[tuple[Positive, ...], BeforeValidator(_as_list)] = ()
    """Closed loop: load levels as numbers of requests in flight."""
    request_rate_rps: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_as_list)] = ()
    """Open loop: load levels as Poisson arrival rates."""
    requests: Positive = 64
    """Requests at each load level in each round."""
    rounds: Positive = 1
    warmup_requests: Annotated[int, Field(ge=0)] = 8
    seed: int = 0

    @field_validator("traffic")
    @classmethod
    def _grammar(cls, value: str) -> str:
        if not _TRAFFIC.fullmatch(value.strip()):
            raise ValueError("traffic is D(in,out), N(mean,sd)/(mean,sd) or U(min,max)/(min,max) in tokens")
        return value.strip()

    @model_validator(mode="after")
    def _one_loop(self) -> Workload:
        if bool(self.concurrency) == bool(self.request_rate_rps):
            raise ValueError("exactly one of concurrency and request_rate_rps is needed")
        return self


class ObjectiveSpec(_Model):
    """What is optimised, and the promises (SLOs) that a setting must keep."""

    maximize: str | None = None
    minimize: str | None = None
    slo: dict[str, dict[str, Annotated[float, Field(gt=0)]]] = {}
    """Metric to statistic to upper limit: `{ttft_ms: {p99: 500}}`."""

    @model_validator(mode="after")
    def _one_metric(self) -> ObjectiveSpec:
        if (self.maximize is None) == (self.minimize is None):
            raise ValueError(
                "exactly one of maximize and minimize is needed, such as {maximize: output_throughput_tok_s}"
            )
        return self

    @property
    def metric(self) -> str:
        """The metric's name."""
        return self.maximize or self.minimize or ""

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Which way is better."""
        return "maximize" if self.maximize is not None else "minimize"


class SearchSpec(_Model):
    """How the space is searched."""

    trials: Positive = 20
    """Measured and graded trials, the baseline included; refused and retried ones do not count."""
    sampler: Literal["auto", "tpe", "gp", "random", "grid"] = "auto"
    seed: int = 0
    time_budget: Duration | None = None
    """No new trial starts after it; running ones end by their own deadline."""
    points: tuple[dict[str, Any], ...] = ()
    """Settings to try first, after the baseline."""


class TrialSpec(_Model):
    """The limits of one trial."""

    timeout_s: Duration = 600.0
    """The trial's only clock, from its actor's start, waiting for resources excluded."""
    hung_after_s: Duration = 300.0
    """A trial without a log line or a finished request for so long is ended as hung."""
    retries: Annotated[int, Field(ge=0)] = 1
    """How often a trial that failed by the environment's fault is run again."""
    max_failed_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """A trial of which a larger share of requests failed has no score."""
    log_limit_mb: Annotated[float, Field(gt=0)] = 64.0
    """A trial's engine log keeps its head and its tail beyond this size."""


class PenaltySpec(_Model):
    """What a failed trial is worth."""

    grade: Literal["progress", "elapsed", "infinite", "ignore"] = "progress"


class ResourceSpec(_Model):
    """What one trial holds."""

    gpus: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """`auto`: tensor x pipeline x data parallel size where the cluster has GPUs, else 0."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    max_concurrent: Positive | None = None
    """Trials at once; None: as many as fit."""


class Study(_Model):
    """One study file."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    model: Annotated[str, Field(min_length=1)]
    """A hub id, a folder, or `bundled:smollm2-135m-instruct`."""
    engine: EngineSpec = EngineSpec()
    search_space: dict[str, Any]
    constraints: tuple[str, ...] = ()
    workload: Workload = Workload(concurrency=(8,))
    objective: ObjectiveSpec = ObjectiveSpec(maximize="output_throughput_tok_s")
    search: SearchSpec = SearchSpec()
    trial: TrialSpec = TrialSpec()
    penalty: PenaltySpec = PenaltySpec()
    resources: ResourceSpec = ResourceSpec()

    @model_validator(mode="after")
    def _space_is_sound(self) -> Study:
        space = self.space  # raises ConfigError with the key in it
        if not space.parameters:
            raise ConfigError(
                "search_space is empty: name at least one parameter, such as max-num-seqs: {int: [1, 64]}."
            )
        for name in space.by_name:
            if name in _RESERVED_ARGS:
                raise ConfigError(f"search_space.{name}: {name!r} is set by the autotuner itself; leave it out.")
            fixed_too = name in self.engine.args or name.removeprefix("env:") in self.engine.env
            if fixed_too and (name in self.engine.args or name.startswith("env:")):
                # Allowed: the fixed value is the baseline's, the space's value overrides it in a trial.
                continue
        known = set(space.by_name) | set(self.fixed)
        for expression in (*space.constraints, *(p.when for p in space.parameters if p.when)):
            for name in sorted(expression.names - known):
                raise ConfigError(
                    f"`{expression.text}` names {name!r}, which is neither in search_space nor in engine.args."
                )
        for index, point in enumerate(self.search.points):
            space.check_point(point, f"search.points[{index}]")
        return self

    @cached_property
    def space(self) -> SearchSpace:
        """The search space, parsed."""
        return parse_space(self.search_space, self.constraints)

    @property
    def fixed(self) -> Params:
        """The fixed arguments and environment, under the names that parameters have."""
        return {**self.engine.args, **{f"env:{name}": value for name, value in self.engine.env.items()}}

    def setting(self, params: Params) -> dict[str, Any]:
        """All arguments and environment of a trial: the fixed ones, with `params` over them."""
        return {**self.fixed, **params}


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file; `overrides` are `key.path=value` with YAML values.

    Raises `ConfigError` for a missing or unreadable file, broken YAML, and whatever `Study` refuses.
    """
    text = _read(path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: broken YAML: {_yaml_problem(error)}") from error
    lines = {} if node is None else dict(_lines(node, path))
    try:
        raw = None if node is None else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: broken YAML: {_yaml_problem(error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a study is a mapping of keys, but this file holds {type(raw).__name__}.")
    for override in overrides:
        _override(raw, override)
    return parse_study(raw, source=str(path), lines=lines)


def parse_study(raw: Mapping[str, Any], source: str = "study", lines: Mapping[str, int] | None = None) -> Study:
    """A `Study` from plain values; raises `ConfigError` that names `source`, line and key."""
    lines = lines or {}
    _reject_unknown_keys(raw, Study, "", source, lines)
    try:
        return Study.model_validate(raw)
    except ConfigError as error:
        key = next((word for word in re.findall(r"^[\w.:-]+", str(error))), "").rstrip(":")
        raise ConfigError(f"{_place(source, key, lines)}: {error}") from error
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, source, lines)[:3])) from error


def _read(path: Path) -> str:
    try:
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder; name the study's YAML file.")
        if path.stat().st_size > MAX_STUDY_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_STUDY_BYTES:,} bytes; is it a study file?")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        nearby = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f" In that folder: {', '.join(nearby[:5])}." if nearby else ""
        raise ConfigError(f"{path}: no such file.{hint}") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from error


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})." if mark else f"{problem}."


def _lines(node: yaml.Node, source: Path, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    """Dotted key to line number, counted from 1; refuses keys that stand twice, aliases and deep nesting."""
    if depth > 20:
        raise ConfigError(f"{source}, line {node.start_mark.line + 1}: nested more than 20 levels deep.")
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield f"{prefix}[{index}]", item.start_mark.line + 1
            yield from _lines(item, source, f"{prefix}[{index}]", depth + 1)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in seen:
                raise ConfigError(f"{source}, line {line}: key {key!r} stands twice.")
            if value.start_mark.index < key_node.start_mark.index or key == "<<":
                raise ConfigError(
                    f"{source}, line {line}: {key}: aliases (*name) are not supported; write the value out."
                )
            seen.add(key)
            yield (path := f"{prefix}.{key}" if prefix else key), line
            yield from _lines(value, source, path, depth + 1)


def _override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: write key.path=value, such as --set search.trials=4.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: broken YAML: {_yaml_problem(error)}") from error
    target, *parts = key.split(".")
    node = raw
    for part in parts:
        child = node.setdefault(target, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {target!r} is {child!r}, not a mapping.")
        node, target = child, part
    node[target] = value


def _place(source: str, key: str, lines: Mapping[str, int]) -> str:
    probe = key
    while probe:
        if probe in lines:
            return f"{source}, line {lines[probe]}"
        probe = re.sub(r"(\.[^.\[]*|\[\d+\]|^[^.\[]*)$", "", probe)
    return source


def _submodel(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next((model for arg in get_args(annotation) if (model := _submodel(arg))), None)
    return None


def _reject_unknown_keys(
    raw: Mapping[Any, Any], model: type[BaseModel], prefix: str, source: str, lines: Mapping[str, int]
) -> None:
    for key, value in raw.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if key not in model.model_fields:
            nearest = _nearest(str(key), prefix, model)
            raise ConfigError(
                f"{_place(source, path, lines)}: unknown key {str(key)!r} in {prefix or 'the study'}. "
                + (f"Did you mean {nearest!r}?" if nearest else f"It takes {', '.join(model.model_fields)}.")
            )
        submodel = _submodel(model.model_fields[key].annotation)
        if submodel and isinstance(value, Mapping):
            _reject_unknown_keys(value, submodel, path, source, lines)


def _nearest(key: str, prefix: str, model: type[BaseModel]) -> str | None:
    """The right key: alike in this place, or the same name in another place."""
    if close := difflib.get_close_matches(key, model.model_fields, n=1):
        return f"{prefix}.{close[0]}" if prefix else close[0]
    everywhere = {path.rsplit(".", 1)[-1]: path for path in _all_keys(Study, "")}
    close = difflib.get_close_matches(key, everywhere, n=1, cutoff=0.75)
    return everywhere[close[0]] if close else None


def _all_keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        path = f"{prefix}.{name}" if prefix else name
        yield path
        if submodel := _submodel(field.annotation):
            yield from _all_keys(submodel, path)


def _explain(error: ValidationError, source: str, lines: Mapping[str, int]) -> list[str]:
    """A line for each wrong key: place, key, what is wrong, the value."""
    messages: dict[str, str] = {}
    for detail in error.errors():
        parts = [
            part for part in detail["loc"] if isinstance(part, int) or not re.search(r"[\[( ]|^constrained", str(part))
        ]
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
        key = re.sub(r"\.(float|int|auto|literal)$", "", key)
        if detail["type"] == "missing":
            message = "is missing"
        else:
            value = detail.get("input")
            shown = f", but got {value!r}" if not isinstance(value, (Mapping, BaseModel)) else ""
            message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ") + shown
            message = f"should be {message}" if detail["msg"].startswith("Input should be") else message
        messages.setdefault(key, f"{_place(source, key, lines)}: {key or 'study'}: {message}.")
    return list(messages.values())
