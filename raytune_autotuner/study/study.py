"""A study as asked for: the keys of a study file, their types and what they mean, as frozen pydantic models.

Plain values go in; what cannot be is pydantic's `ValidationError`, or a `ConfigError` that opens with the key. It does
not know where a study stands written: `file.py` reads one and names the place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from raytune_autotuner.study.errors import ConfigError, shown
from raytune_autotuner.study.masking import is_secret, secrets_in
from raytune_autotuner.study.paths import expanded
from raytune_autotuner.study.space import SCHEMA, Params, SearchSpace, check_name, parse_space
from raytune_autotuner.study.trust import danger, exposes

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAX_DURATION_CHARACTERS = 40
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TRAFFIC = re.compile(
    r"D\(\s*\d{1,7}\s*,\s*\d{1,7}\s*\)"
    r"|[NU]\(\s*\d{1,7}\s*,\s*\d{1,7}\s*\)\s*/\s*\(\s*\d{1,7}\s*,\s*\d{1,7}\s*\)"
)
_ENGINES_OF_OURS = {"vllm", "simulated"}
"""Kinds that name no program."""
_STATISTIC = re.compile(r"mean|p\d+")
_ASSIGNED = re.compile(r"""-{0,2}(?P<name>[\w.-]+)=(?!["']?\$)(?P<value>.*)""", re.DOTALL)
"""A word that gives a flag or a variable its value; one that a shell would look up is no value."""
PLACEHOLDER = re.compile(r"\{([A-Za-z][\w.-]*)\}")
"""A name in braces in `engine.command`, in whose place a value goes."""
ALWAYS_KNOWN = ("model", "host", "port", "python")
"""Placeholders that are no parameters."""
# Which kinds of engine a key of `engine` is for, where not for all.
_ONLY_OF = {
    **dict.fromkeys(("command", "ready", "version"), ("command",)),
    "base_url": ("running",),
    **dict.fromkeys(("served_model", "api", "request", "exact_lengths"), ("command", "running")),
    **dict.fromkeys(("args", "env"), ("vllm", "simulated", "command")),
    "search_weights": ("vllm", "simulated"),
}
_NEEDED = (
    ("command", "command", '[llama-server, -m, "{model}", --port, "{port}"]'),
    ("running", "base_url", "http://127.0.0.1:8000"),
)
# Arguments that the autotuner itself gives to the engine.
_RESERVED_ARGS = {
    *("host", "port", "model", "served-model-name", "config", "api-key", "uds"),
    *("nnodes", "node-rank", "master-addr", "master-port", "headless"),
}


def _parse_duration(value: Any) -> Any:
    """Seconds from a number or from text such as `40m`, `1h 30m`, `90s`."""
    if not isinstance(value, str):
        return value
    short = value[:_MAX_DURATION_CHARACTERS]
    parts = _DURATION.findall(short)
    if short != value or not parts or _DURATION.sub("", value).strip():
        raise ValueError("a duration is a number of seconds or text such as 90s, 40m, 1h 30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def _as_list(value: Any) -> Any:
    if value is None:
        return []
    return value if isinstance(value, (list, tuple)) else [value]


_COUNT = {"type": "integer", "minimum": 1}
_NUMBER = {"type": "number", "exclusiveMinimum": 0}
_METRIC = {"type": "string", "x-unit": "metric"}
_PATH = {"type": "string", "format": "path"}
_SCALAR = {"type": ["string", "number", "boolean"]}
_SHARE: dict[str, JsonValue] = {"x-unit": "share"}


def _one_or_list(items: dict[str, Any]) -> WithJsonSchema:
    """As the file may have it: one value, or a list of them."""
    return WithJsonSchema({"anyOf": [items, {"type": "array", "items": items}]})


# Strict: without it `true` would be 1.
Duration = Annotated[
    float,
    BeforeValidator(_parse_duration),
    Field(gt=0, strict=True),
    WithJsonSchema({"type": ["number", "string"], "exclusiveMinimum": 0, "x-unit": "duration"}),
]
"""Seconds; in the file a number or text such as `40m`."""
Positive = Annotated[int, Field(ge=1, le=1_000_000, strict=True)]
Natural = Annotated[int, Field(ge=0, le=1_000_000, strict=True)]
Seed = Annotated[int, Field(ge=0, le=4_000_000_000, strict=True)]
PositiveNumber = Annotated[float, Field(gt=0, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, strict=True, json_schema_extra=_SHARE)]
Direction = Literal["maximize", "minimize"]
Grade = Literal["progress", "elapsed", "infinite", "ignore"]


class _Model(BaseModel):
    # What stands below a field is its description in the schema and in docs/study-file.md.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=False, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _check_own(section: str, name: str) -> None:
    """Raise `ConfigError` for what is no name of a flag, or one that the autotuner sets."""
    check_name(section, name)
    if name in _RESERVED_ARGS:
        raise ConfigError(f"{section}.{name}: is set by the autotuner itself; leave it out.")
    if section == "engine.args" and name.startswith("env:"):
        raise ConfigError(f"engine.args.{name}: write it under engine.env, as {name.removeprefix('env:')}.")


class EngineSpec(_Model):
    """Which engine, with which fixed arguments."""

    kind: Literal["vllm", "simulated", "command", "running"] = "vllm"
    """`simulated` is a real server with a made-up machine behind it, for a first look and for tests. `command` is any
    server with OpenAI's API, `running` one that runs already: see [engines.md](engines.md)."""
    args: dict[str, Any] = {}
    """Fixed flags of every trial, the baseline too: the engine's own names without dashes, such as `max-model-len:
    2048`. `true` becomes `--flag`, `false` `--no-flag`, `null` leaves it out; mappings and lists are passed as JSON."""
    env: Annotated[dict[str, str], WithJsonSchema({"type": "object", "additionalProperties": _SCALAR})] = {}
    """Environment variables of the engine."""
    python: Path | None = None
    """The Python that has the engine in it. Default: the one that runs the study."""
    search_weights: Literal["real", "dummy"] = "real"
    """`dummy`: trials of the search load no weights; finalists and baseline are verified on the real ones. See
    [search.md](search.md#a-search-without-weights)."""
    trust_code: Annotated[bool, Field(strict=True)] = False
    """Whether `args`, `env` and `search_space` may make the engine load or run other code; see
    [security.md](security.md#what-a-study-file-can-do)."""

    @property
    def trusts_code(self) -> bool:
        """Whether the study says that it means code: in so many words, or by a kind that names its program itself."""
        return self.trust_code or self.kind not in _ENGINES_OF_OURS

    command: tuple[str, ...] = ()
    """Kind `command`, needed there: **a program that the study runs**, and its arguments, with placeholders such as
    `{model}` and `{port}`; see [engines.md](engines.md)."""
    ready: Annotated[str, Field(pattern=r"^/\S*$")] = "/health"
    """Kind `command`: the path that answers with status 200 once it serves."""
    version: tuple[str, ...] = ()
    """Kind `command`: **a program that the study runs**, with its arguments; its first line is the engine's version."""
    base_url: Annotated[str, Field(pattern=r"^https?://[^/\s]+(/\S*)?$")] | None = None
    """Kind `running`, needed there: where it answers, such as `http://127.0.0.1:8000`."""
    served_model: str | None = None
    """Kinds `command` and `running`: the model's name in requests. Default: what stands for `{model}`; of a running
    server, what it says that it serves."""
    api: Literal["completions", "completions-text", "chat"] = "completions"
    """Kinds `command` and `running`: `/v1/completions` with token ids or with text, or `/v1/chat/completions`."""
    request: dict[str, Any] = {}
    """Kinds `command` and `running`: fields of every request over the usual ones; `null` leaves one out."""
    exact_lengths: Annotated[bool, Field(strict=True)] = True
    """Kinds `command` and `running`: whether an answer that is shorter than asked for is a failed one."""

    @property
    def placeholders(self) -> frozenset[str]:
        """The names in braces in the command and in the environment of kind `command`."""
        return frozenset(name for text in (*self.command, *self.env.values()) for name in PLACEHOLDER.findall(text))

    @field_validator("python")
    @classmethod
    def _in_full(cls, value: Path | None) -> Path | None:
        # Trials run in folders of their own; a bare name is looked for on the path.
        return expanded("engine.python", value).absolute() if value is not None and len(value.parts) > 1 else value

    @field_validator("base_url")
    @classmethod
    def _can_be_asked(cls, value: str | None) -> str | None:
        if value is not None:
            _ = urlsplit(value).port  # raises `ValueError` for what is no port, and no address in brackets
        return value

    @field_validator("command", "version", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("a program and its arguments are a list, such as [llama-server, --port, 8000]")
        numbers = isinstance(value, (list, tuple))
        return [str(part) if type(part) in (int, float) else part for part in value] if numbers else value

    @field_validator("env", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        for name, one in value.items():
            if not _VARIABLE.fullmatch(str(name)):
                raise ConfigError(f"engine.env: {shown(name)} is not the name of an environment variable.")
            if one is None:
                raise ConfigError(f"engine.env.{name}: has no value; write one, or leave it out.")
        return {name: one if isinstance(one, str) else json.dumps(one) for name, one in value.items()}

    @field_validator("args")
    @classmethod
    def _own_args(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            _check_own("engine.args", name)
        return value

    @model_validator(mode="after")
    def _of_its_kind(self) -> EngineSpec:
        for name, kinds in _ONLY_OF.items():
            if self.kind not in kinds and getattr(self, name) != EngineSpec.model_fields[name].default:
                raise ConfigError(f"engine.{name}: is for engine.kind {' or '.join(kinds)}, but it is {self.kind}.")
        for kind, name, example in _NEEDED:
            if self.kind == kind and not getattr(self, name):
                raise ConfigError(f"engine.{name}: is needed with engine.kind {kind}, such as {example}.")
        if self.kind == "command" and "port" not in self.placeholders:
            raise ConfigError("engine.command: names no {port}, so it would not listen where it is asked to; add it.")
        return self


class PrefixSpec(_Model):
    """Beginnings that prompts share, as system prompts and few-shot examples do."""

    tokens: Positive
    """Tokens that prompts share, put before those that `traffic` draws: a prompt has both."""
    groups: Positive = 1
    """How many different beginnings there are; each request takes one at random."""


class Workload(_Model):
    """The load that every trial is measured under."""

    traffic: str = "D(128,32)"
    """Tokens of prompt and answer: `D(in,out)` fixed, `N(mean,sd)/(mean,sd)` normal, `U(min,max)/(min,max)` uniform;
    the prompt's first."""
    dataset: Path | None = None
    """A file of prompts and answer lengths, in place of `traffic`."""
    trace: Path | None = None
    """A file of arrival times and token counts, in place of `traffic` and of a load level."""
    prefix: PrefixSpec | None = None
    client: Literal["builtin", "vllm-bench"] = "builtin"
    """Who sends the load: the autotuner's own client, or vLLM's `bench serve`."""
    client_processes: Literal["auto"] | Annotated[int, Field(ge=1, le=1000, strict=True)] = "auto"
    """Processes among which `builtin` divides a load. `auto`: one, and more in a trial whose load leaves that no CPU;
    see [measuring.md](measuring.md#more-than-one-process)."""
    concurrency: Annotated[tuple[Positive, ...], BeforeValidator(_as_list), _one_or_list(_COUNT)] = ()
    """Closed loop: requests in flight. Each number is a load level, named `c16`."""
    request_rate_rps: Annotated[tuple[PositiveNumber, ...], BeforeValidator(_as_list), _one_or_list(_NUMBER)] = ()
    """Open loop: Poisson arrivals per second. Each number is a load level, named `r2.5`."""
    requests: Positive = 64
    """Requests at each level in each round."""
    rounds: Positive = 1
    """How often all levels are measured; samples of all rounds are pooled."""
    warmup_requests: Literal["auto"] | Natural = "auto"
    """Requests at each level before the first round, which are not measured. `auto`: as many as are in flight there, or
    come in a second, and 8 at least."""
    seed: Annotated[int, Field(strict=True)] = 0
    """Of prompts, lengths and arrival times."""

    @field_validator("traffic")
    @classmethod
    def _grammar(cls, value: str) -> str:
        if not _TRAFFIC.fullmatch(value.strip()):
            raise ValueError("traffic is D(in,out), N(mean,sd)/(mean,sd) or U(min,max)/(min,max) in tokens")
        return value.strip()

    @field_validator("dataset", "trace", mode="before")
    @classmethod
    def _no_uri(cls, value: Any) -> Any:
        if isinstance(value, str) and "://" in value:
            raise ValueError("takes a path that every node has, not a URI; fetch it first")
        return value

    @field_validator("dataset", "trace")
    @classmethod
    def _in_full(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        # Trials run in folders of their own.
        return expanded(f"workload.{info.field_name}", value).absolute() if value is not None else None

    @model_validator(mode="after")
    def _one_traffic(self) -> Workload:
        given = [name for name in ("traffic", "dataset", "trace") if name in self.model_fields_set]
        given = [name for name in given if getattr(self, name) is not None]
        if self.dataset is not None or self.trace is not None:
            # As written by a run: the default stands beside what takes its place.
            given = [name for name in given if name != "traffic" or self.traffic != Workload.model_fields[name].default]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; leave one out")
        return self

    @model_validator(mode="after")
    def _one_bench_serve(self) -> Workload:
        if self.client != "builtin" and self.client_processes not in ("auto", 1):
            raise ConfigError(
                f"workload.client_processes: is for workload.client builtin, but that is {self.client}; leave one out."
            )
        return self

    @model_validator(mode="after")
    def _one_loop(self) -> Workload:
        if self.trace is not None:
            if self.concurrency or self.request_rate_rps:
                raise ValueError("a trace has its own arrival times; leave concurrency and request_rate_rps out")
        elif bool(self.concurrency) == bool(self.request_rate_rps):
            raise ValueError("exactly one of concurrency and request_rate_rps is needed")
        return self


class ObjectiveSpec(_Model):
    """What is optimised, and the promises (SLOs) that a setting must keep."""

    maximize: Annotated[tuple[str, ...], BeforeValidator(_as_list), _one_or_list(_METRIC)] = ()
    """The metric to make large, such as `output_throughput_tok_s`. Several give a Pareto front."""
    minimize: Annotated[tuple[str, ...], BeforeValidator(_as_list), _one_or_list(_METRIC)] = ()
    """The metric to make small, such as `ttft_ms_p90`. Beside `maximize`: several objectives."""
    slo: dict[str, dict[str, PositiveNumber]] = {}
    """Upper limits that the winner must keep: metric to statistic to limit, in the metric's unit: `{ttft_ms: {p90:
    500}, tpot_ms: {mean: 50}}`."""
    attainment: Annotated[float, Field(gt=0, le=1, strict=True, json_schema_extra=_SHARE)] | None = None
    """The share of a level's requests that must meet every limit, each judged by itself. Default: the statistics of
    `slo` decide."""

    @field_validator("slo", mode="before")
    @classmethod
    def _under_statistics(cls, value: Any) -> Any:
        for name, limits in value.items() if isinstance(value, Mapping) else ():
            if type(limits) in (int, float):
                latency, _, statistic = f"{name:.40}".rpartition("_")
                if not _STATISTIC.fullmatch(statistic):
                    latency, statistic = f"{name:.40}", "p90"
                right = f"{latency}: {{{statistic}: {limits:g}}}"
                raise ConfigError(f"objective.slo: a limit stands under its statistic: write {right}.")
        return value

    @model_validator(mode="after")
    def _some_metric(self) -> ObjectiveSpec:
        names = [*self.maximize, *self.minimize]
        if not names:
            raise ValueError("maximize or minimize is needed, such as {maximize: output_throughput_tok_s}")
        if len(set(names)) < len(names):
            raise ValueError("the same metric stands there twice; leave one out")
        return self

    @property
    def targets(self) -> tuple[tuple[str, Direction], ...]:
        """Every objective's metric and the way that is better, those to maximise first."""
        return (*((name, "maximize") for name in self.maximize), *((name, "minimize") for name in self.minimize))

    @property
    def metric(self) -> str:
        """The first objective's metric."""
        return self.targets[0][0]

    @property
    def direction(self) -> Direction:
        """Which way of the first objective is better."""
        return self.targets[0][1]

    @property
    def in_scores(self) -> tuple[Literal["slo", "attainment"], ...]:
        """Which of its own keys the scores themselves depend on: goodput is another figure under another SLO."""
        names = {name.partition("@")[0] for name, _ in self.targets}
        if "max_load_under_slo" in names:
            return ("slo", "attainment")
        return ("slo",) if names & {"goodput_rps", "slo_attainment"} else ()


class SearchSpec(_Model):
    """How the space is searched."""

    trials: Positive = 20
    """Trials that are measured or fail by their setting, the baseline included. Refused settings and repeated trials do
    not count."""
    sampler: Literal["auto", "tpe", "gp", "nsga2", "random", "grid"] = "auto"
    """How settings are suggested. `auto` chooses and says why. `gp` needs torch. All take several objectives."""
    seed: Seed = 0
    """Of the sampler."""
    time_budget: Duration | None = None
    """After it no new trial starts; running ones end by their own limit."""
    points: tuple[dict[str, Any], ...] = ()
    """Settings to try first, right after the baseline. Names and values must lie in the search space."""
    warm_start: Annotated[tuple[str, ...], BeforeValidator(_as_list), _one_or_list(_PATH)] = ()
    """Results folders, or their URIs, of earlier studies to learn from. Model, engine, its fixed arguments, hardware,
    workload and what the scores rest on (the SLO of a goodput, the price of a cost) must be the same; what is not is
    refused and named. Settings outside the search space and trials without this study's figures are left out."""
    cache: Annotated[bool, Field(strict=True)] = False
    """Whether a setting that an earlier run under the same `--results` has measured in the same way is answered from
    there and costs no trial; see [search.md](search.md#answers-of-earlier-runs)."""
    target: Annotated[float, Field(strict=True)] | None = None
    """The search ends once the first objective is as good as this, with every SLO met."""
    plateau: Positive | None = None
    """The search ends after so many trials in a row that found nothing better. With several objectives better is what
    no earlier trial equals or beats in all of them."""
    stop_early: Annotated[bool, Field(strict=True)] = True
    """Whether a trial ends between two loads once it cannot beat the best one so far."""
    max_failures_in_a_row: Positive = 50
    """The search ends after so many failed trials in a row."""


class TrialSpec(_Model):
    """The limits of one trial."""

    timeout_s: Duration = 600.0
    """The trial's only clock, from its start, waiting for CPUs or GPUs excluded."""
    hung_after_s: Duration = 300.0
    """A trial without a log line or a finished request for so long is ended as hung."""
    retries: Natural = 1
    """How often a trial that failed through no fault of its setting (a killed actor, a taken port) is run again;
    those lost with their node do not count."""
    max_failed_share: Annotated[float, Field(ge=0, lt=1, strict=True, json_schema_extra=_SHARE)] = 0.05
    """A trial has no score where a larger share of the requests of one load failed, warm-up included."""
    log_limit_mb: PositiveNumber = 64.0
    """Beyond this size an engine's log keeps only its head and its tail."""


class PenaltySpec(_Model):
    """What a failed trial is worth."""

    grade: Grade = "progress"
    """What a failed trial is worth to the sampler. `progress`: the further it got, by stage, the less it costs. The
    others are there to compare with."""


class QualitySpec(_Model):
    """How much worse than the baseline's a setting's answers may be, for spaces that hold what changes them."""

    max_perplexity_rise: Share = 0.02
    """How much higher than the baseline's the perplexity of a fixed text may be."""
    max_answer_change: Share = 0.2
    """At how many of the words of its greedy answers a setting may part from the baseline, having written the same
    until then."""


class VerifySpec(_Model):
    """How the best settings are measured again before one is recommended."""

    top: Natural = 2
    """How many of the best settings are measured again, against the baseline, before one is recommended. 0: none."""
    restarts: Annotated[int, Field(ge=2, le=1000, strict=True)] = 5
    """Fresh engine starts of each of them and of the baseline, interleaved; at least 2."""

    @property
    def starts(self) -> int:
        """Engine starts at most: those of the finalists and of the baseline."""
        return (self.top + 1) * self.restarts if self.top else 0


class ResourceSpec(_Model):
    """What one trial holds."""

    gpus: Literal["auto"] | Annotated[float, Field(ge=0, strict=True)] = "auto"
    """GPUs that a trial holds. `auto`: tensor x pipeline x data parallel size of its setting where the cluster has
    GPUs, else none."""
    cpus: PositiveNumber = 1.0
    """CPUs that a trial holds in Ray's books, on each of its nodes."""
    nodes: Positive = 1
    """Nodes over which a trial's engine spans, for a model that is too large for one; its GPUs are divided evenly
    among them. Kinds `vllm` and `simulated`; see [cluster.md](cluster.md#one-trial-over-several-nodes)."""
    max_concurrent: Positive | None = None
    """Trials at once. Default: as many as fit. On a CPU use 1: trials that share cores measure each other."""
    accelerator_type: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]{0,62}$")] | None = None
    """Only nodes with this accelerator, by Ray's name for it, such as `H100`."""
    node_labels: dict[
        Annotated[str, Field(pattern=r"^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?$")],
        Annotated[str, Field(pattern=r"^[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?$")],
    ] = {}
    """Only nodes with all of these labels, as given by `ray start --labels`: `{pool: tuning}`."""
    price_per_hour: PositiveNumber | None = None
    """Of one GPU, or of the machine where a trial holds none; gives `cost_per_million_tokens`."""

    @model_validator(mode="after")
    def _even(self) -> ResourceSpec:
        if self.nodes > 1 and self.gpus != "auto" and self.gpus % self.nodes:
            raise ConfigError(f"resources.gpus: {self.gpus:g} cannot be divided evenly among {self.nodes} nodes.")
        return self


class RaySpec(_Model):
    """The Ray cluster on which the trials run."""

    address: Annotated[str, Field(min_length=1)] | None = None
    """`auto` or HOST:PORT of a Ray cluster that runs, of which this machine is a node; `--address` wins. Default: a Ray
    of its own on this machine, or, in a Ray job, the job's. See [cluster.md](cluster.md)."""

    @field_validator("address")
    @classmethod
    def _not_from_outside(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise ValueError("auto or HOST:PORT, from a node of the cluster; from elsewhere, submit the study as a job")
        return value


class Study(_Model):
    """One study file."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Name of the study and of its results folder: letters, digits, `.`, `_`, `-`; 64 at most."""
    model: Annotated[str, Field(min_length=1)]
    """A hub id (`meta-llama/Llama-3.1-8B-Instruct`), a folder with a `config.json`, or `bundled:smollm2-135m-instruct`.
    """
    engine: EngineSpec = EngineSpec()
    search_space: Annotated[dict[str, Any], WithJsonSchema(dict(SCHEMA))] = {}
    """The parameters to search. Only `bench`, which measures one setting, does without."""
    constraints: tuple[str, ...] = ()
    """Conditions between parameters."""
    workload: Workload = Workload(concurrency=(8,))
    objective: ObjectiveSpec = ObjectiveSpec(maximize="output_throughput_tok_s")
    search: SearchSpec = SearchSpec()
    trial: TrialSpec = TrialSpec()
    penalty: PenaltySpec = PenaltySpec()
    quality: QualitySpec | None = None
    verify: VerifySpec = VerifySpec()
    resources: ResourceSpec = ResourceSpec()
    ray: RaySpec = RaySpec()
    results: Annotated[str, Field(min_length=1)] | None = None
    """Parent of the runs' folders: a folder, or a URI of `s3`, `gs` or `file`. Default: `results`. `--results` wins."""

    @field_validator("model")
    @classmethod
    def _no_flag(cls, value: str) -> str:
        if value.startswith("-"):
            raise ConfigError(f"model: {shown(value)} would be a flag to the engine; write a hub id, or ./ before it.")
        return value

    @model_validator(mode="after")
    def _space_is_sound(self) -> Study:
        space = self.space  # raises ConfigError with the key in it
        for name in space.by_name:
            _check_own("search_space", name)
        self._check_placeholders()
        space.check_expressions(self.fixed)
        for index, point in enumerate(self.search.points):
            where = f"search.points[{index}]"
            space.check_point(point, where)
            if broken := space.violated(point, self.fixed):
                raise ConfigError(f"{where}: {shown(point)} breaks the constraint `{broken.text:.100}`.")
        return self

    @model_validator(mode="after")
    def _dummy_weights_do_not_mislead(self) -> Study:
        if self.engine.search_weights == "dummy" and (why := self._why_real_weights()):
            raise ConfigError(f"engine.search_weights: dummy: {why}; write search_weights: real.")
        return self

    @model_validator(mode="after")
    def _can_span_nodes(self) -> Study:
        if self.resources.nodes == 1:
            return self
        if self.engine.kind not in _ENGINES_OF_OURS:
            raise ConfigError(f"resources.nodes: is for engine.kind vllm or simulated, but it is {self.engine.kind}.")
        for where, name, value in self._given():
            if name == "data-parallel-size" and value not in (None, 1):
                raise ConfigError(
                    f"{where}: copies of a model are not spread over nodes: resources.nodes is {self.resources.nodes}, "
                    f"and it is {shown(value)}.\nLeave it out, and divide the model by tensor-parallel-size and "
                    "pipeline-parallel-size; a copy more is an engine more."
                )
        return self

    def _why_real_weights(self) -> str | None:
        """Why figures of made-up weights would say nothing of the real ones, as far as the study tells."""
        names = {name.partition(".")[0] for name in (*self.fixed, *self.space.by_name)}
        if drafts := sorted(name for name in names if name.startswith("spec")):
            return f"{drafts[0]}: how many drafted tokens are taken depends on the weights"
        if "load-format" in names:
            return "load-format is set in the study too"
        if self.quality is not None:
            return "quality asks what the weights answer"
        if self.verify.top == 0:
            return "verify.top is 0, so no setting would ever be measured on the real weights"
        return None

    @property
    def searched(self) -> Study:
        """The study as the trials of its search start engines: on made-up weights, where it says so."""
        if self.engine.search_weights == "real":
            return self
        engine = self.engine.model_copy(update={"args": {**self.engine.args, "load-format": "dummy"}})
        return self.model_copy(update={"engine": engine})

    @model_validator(mode="after")
    def _gives_nothing_away(self) -> Study:
        """No secret where others see it, and no code but where the study says that it means it."""
        for where, name, value in self._given():
            if name.startswith("env:") and is_secret(name) and where.startswith("search_space."):
                raise ConfigError(f"{where}: a secret is no parameter: settings are shown. Write it under engine.env.")
            if exposes(name, value):
                raise ConfigError(
                    f"{where}: holds a secret, which the process list would show to everyone on the machine.\n"
                    "Give it to the engine as an environment variable: your own, or one under engine.env."
                )
            if not self.engine.trusts_code and (why := danger(name, value)):
                raise ConfigError(
                    f"{where}: {why}; got {shown(value)}.\n"
                    "Leave it out; or, where you trust all of this study, add engine: {trust_code: true}."
                )
        return self

    def _given(self) -> Iterator[tuple[str, str, Any]]:
        """(key, name, value) of whatever reaches the engine."""
        yield from ((f"engine.args.{name}", name, value) for name, value in self.engine.args.items())
        yield from ((f"engine.env.{name}", f"env:{name}", value) for name, value in self.engine.env.items())
        for key, words in (("engine.command", self.engine.command), ("engine.version", self.engine.version)):
            yield from ((key, flag.lstrip("-"), word) for flag, word in pairwise(("", *words)))
            assigned = filter(None, map(_ASSIGNED.fullmatch, words))
            yield from ((key, found["name"], found["value"]) for found in assigned)
        for parameter in self.space.parameters:
            yield from ((f"search_space.{parameter.name}", parameter.name, value) for value in parameter.bounds)

    @property
    def secrets(self) -> set[str]:
        """What nothing that is written may hold."""
        return secrets_in(self.engine.env)

    def _check_placeholders(self) -> None:
        """A placeholder is filled in every setting, the baseline included."""
        if self.engine.kind != "command":
            return
        for name in sorted(self.engine.placeholders - {*ALWAYS_KNOWN}):
            if self.fixed.get(name) is None:
                known = ", ".join((*ALWAYS_KNOWN, *self.space.by_name))
                value = f"give the baseline's value in engine.args, as {name}" if name in self.space.by_name else ""
                raise ConfigError(f"engine.command: {{{name}}} has no value; {value or f'known are {known}'}.")

    @cached_property
    def space(self) -> SearchSpace:
        """The search space, parsed."""
        return parse_space(self.search_space, self.constraints)

    @property
    def fixed(self) -> Params:
        """The fixed arguments and environment, under the names that parameters have.

        Variables are text, but those that are parameters too have the values that these have: `2`, not `"2"`.
        """
        variables: dict[str, Any] = {f"env:{name}": text for name, text in self.engine.env.items()}
        for name in variables.keys() & self.space.by_name.keys():
            variables[name] = self.space.by_name[name].distribution.meant(variables[name])
        return {**self.engine.args, **variables}

    @property
    def files(self) -> dict[str, Path]:
        """Key to path, of what every machine that runs trials must have."""
        named = {
            "workload.dataset": self.workload.dataset,
            "workload.trace": self.workload.trace,
            "engine.python": self.engine.python,
            "model": Path(self.model) if self.model.startswith("/") and self.engine.kind != "running" else None,
        }
        # A bare name is looked for on the path.
        return {key: path for key, path in named.items() if path is not None and path.is_absolute()}

    def setting(self, params: Params) -> dict[str, Any]:
        """All arguments and environment of a trial: the fixed ones, with `params` over them."""
        return {**self.fixed, **params}

    def parts(self, params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments of a trial, and its environment by the variables' own names; what is None is left out."""
        given = {name: value for name, value in self.setting(params).items() if value is not None}
        variables = {name: value for name, value in given.items() if name.startswith("env:")}
        flags = {name: value for name, value in given.items() if name not in variables}
        return flags, {name.removeprefix("env:"): value for name, value in variables.items()}


def only_setting(study: Study, params: Params) -> Study:
    """`study` with nothing to search but `params`, so that they are checked as a search space is.

    Raises `ConfigError` for what cannot be a parameter's name.
    """
    values = {name: getattr(study, name) for name in Study.model_fields}
    space = {name: {"choice": [value]} for name, value in params.items()}
    return Study.model_validate({**values, "search_space": space, "constraints": (), "search": SearchSpec()})
