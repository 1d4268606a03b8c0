"""A study explained without starting an engine or a cluster: what would be searched, refused, held and spent.

The engine's own checks are asked; figures of time come from earlier runs of the same study, where there are any.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna

from raytune_autotuner.engine.catalog import make_engine
from raytune_autotuner.engine.contract import Engine
from raytune_autotuner.load.workload import lengths, levels
from raytune_autotuner.report.runs import runs_at
from raytune_autotuner.report.store import Store
from raytune_autotuner.report.wording import describe_params, format_duration
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Failure
from raytune_autotuner.study.space import Params, setting_key
from raytune_autotuner.study.study import Study, Workload
from raytune_autotuner.study.trial import State, TrialRow
from raytune_autotuner.tune.checks import check_study
from raytune_autotuner.tune.cluster import Cluster, this_machine
from raytune_autotuner.tune.samplers import make_sampler
from raytune_autotuner.tune.tell import suggest

SUGGESTIONS = 10
SAMPLED = 200
"""Random settings from which the refused share is estimated."""


@dataclass(frozen=True)
class Suggestion:
    """A setting that the search would begin with, and what would become of it."""

    params: Params
    refused: str | None
    """Why it would not be started; None where it would."""


@dataclass(frozen=True)
class Load:
    """What each trial is measured under."""

    levels: tuple[str, ...]
    rounds: int
    requests: int
    """At each level in each round."""
    tokens_in: float | None
    """Of a prompt, on average; None for text, whose tokens the engine counts."""
    tokens_out: float
    """Of an answer, on average."""

    @classmethod
    def of(cls, workload: Workload) -> Load:
        """That of a study."""
        scale = levels(workload)
        sizes = [size for level in scale for size in lengths(workload, level)]
        tokens_in, tokens_out = (sum(tokens) / len(sizes) for tokens in zip(*sizes, strict=True))
        text = any(tokens == 0 for tokens, _ in sizes)
        labels = tuple(level.label for level in scale)
        return cls(labels, workload.rounds, len(sizes) // len(scale), None if text else tokens_in, tokens_out)

    def __str__(self) -> str:
        rounds = f" in {self.rounds} rounds" if self.rounds > 1 else ""
        prompt = "text and" if self.tokens_in is None else f"{self.tokens_in:,.0f} +"
        sizes = f"{self.requests:,} requests each, of {prompt} {self.tokens_out:,.0f} tokens on average"
        return f"{', '.join(self.levels)}{rounds}: {sizes}"


@dataclass(frozen=True)
class Explanation:
    """What a study comes to on this machine."""

    study: str
    settings: float
    """Size of the search space; infinite with a float range without steps."""
    refused_share: float
    """Of random settings, the share that constraints or the engine's own checks refuse."""
    reasons: Mapping[str, int]
    """Why they are refused, and how many of them."""
    sampler: str
    load: Load
    machine: str
    slots: int
    """Trials at once."""
    trials: int
    restarts: int
    """Further trials that measure the finalists and the baseline again, at most."""
    at_most_s: float
    """If every trial took its whole limit."""
    likely_s: float | None
    """By the median trial of earlier runs; None without one."""
    price_at_most: float | None
    """None without `resources.price_per_hour`."""
    suggestions: tuple[Suggestion, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite size is null."""
        return {**asdict(self), "settings": self.settings if self.settings != float("inf") else None}


def explain(study: Study, results: Path | Store) -> Explanation:
    """Explain `study`; raises `ConfigError` for whatever would keep it from being run here."""
    check_study(study, results)
    engine = make_engine(study)
    cluster = this_machine()
    try:
        engine.preflight()
        if study.ray.address is None:
            cluster.require(study, engine)
        slots = max(cluster.slots(study, engine), 1)
        refused = _refusals(study, engine, SAMPLED)
        first = _first(study, engine)
    finally:
        engine.close()
    trials, restarts = study.search.trials, study.verify.starts
    at_most_s = (math.ceil(trials / slots) + math.ceil(restarts / slots)) * study.trial.timeout_s
    if study.search.time_budget is not None:
        at_most_s = min(at_most_s, study.search.time_budget + study.trial.timeout_s)
    median_s = _median_trial_s(study, results)
    return Explanation(
        study.study,
        study.space.size,
        sum(refused.values()) / SAMPLED,
        refused,
        make_sampler(study, slots)[1],
        Load.of(study.workload),
        cluster.shape,
        slots,
        trials,
        restarts,
        at_most_s,
        None if median_s is None else (trials + restarts) * median_s / slots,
        _price(study, engine, cluster, slots, at_most_s),
        first,
    )


def _first(study: Study, engine: Engine) -> tuple[Suggestion, ...]:
    """The baseline, the study's own points, and what its sampler would suggest before it has measured anything."""
    found = [{}, *study.search.points, *_draw(study, make_sampler(study, 1)[0], SUGGESTIONS)]
    each_once = {setting_key(params): params for params in found}.values()  # a small space has no ten
    return tuple(Suggestion(params, _why(study, engine, params)) for params in [*each_once][:SUGGESTIONS])


def _refusals(study: Study, engine: Engine, count: int) -> dict[str, int]:
    """Reasons that differ in their numbers only are one: the first stands for all."""
    counts, examples = Counter[str](), dict[str, str]()
    for params in _draw(study, optuna.samplers.RandomSampler(seed=study.search.seed), count):
        if (why := _why(study, engine, params)) is not None:
            alike = re.sub(r"\d+", "#", why)
            counts[alike] += 1
            examples.setdefault(alike, why)
    return {examples[alike]: refused for alike, refused in counts.most_common()}


def _draw(study: Study, sampler: optuna.samplers.BaseSampler, count: int) -> list[dict[str, Any]]:
    ot_study = optuna.create_study(sampler=sampler)
    return [suggest(ot_study.ask(), study.space, study.fixed) for _ in range(count)]


def _why(study: Study, engine: Engine, params: Params) -> str | None:
    broken = study.space.violated(params, study.fixed)
    if broken is not None:
        return f"breaks `{broken.text}`"
    failure: Failure | None = engine.refuse(params)
    return None if failure is None else f"{failure.kind}: {failure.evidence}"


def _median_trial_s(study: Study, results: Path | Store) -> float | None:
    rows: list[TrialRow] = []
    for run in runs_at(results, study.study):
        with suppress(ConfigError):  # a broken run says nothing of the time that trials take
            rows += run.read_rows()
    seconds = [row.result.seconds.get("total", 0.0) for row in rows if row.state is State.MEASURED]
    return statistics.median(seconds) if seconds else None


def _price(study: Study, engine: Engine, cluster: Cluster, slots: int, at_most_s: float) -> float | None:
    if study.resources.price_per_hour is None:
        return None
    held = cluster.trial_resources(study, engine, {})["gpus"] * slots
    return study.resources.price_per_hour * max(held, 1.0) * study.resources.nodes * at_most_s / 3600


def render(explained: Explanation) -> str:
    """For people."""
    size = "endless" if explained.settings == float("inf") else f"{explained.settings:,.0f}"
    lines = [
        f"study {explained.study}",
        f"  space     {size} settings; {explained.refused_share:.0%} of random ones are refused before any start",
        *(f"              {count:>4}  {reason}" for reason, count in [*explained.reasons.items()][:5]),
        f"  sampler   {explained.sampler}",
        f"  load      {explained.load}",
        f"  machine   {explained.machine}; {explained.slots} at once",
        f"  trials    {explained.trials}, then up to {explained.restarts} to measure the best again",
        f"  time      at most {format_duration(explained.at_most_s)}{_likely(explained)}",
    ]
    if explained.price_at_most is not None:
        lines.append(f"  price     at most {explained.price_at_most:,.2f}")
    lines.append("  first suggestions")
    for number, suggestion in enumerate(explained.suggestions):
        what = describe_params(suggestion.params) if suggestion.params else "the baseline: the engine's defaults"
        lines.append(f"    {number:>2}  {what}" + (f"  refused: {suggestion.refused}" if suggestion.refused else ""))
    return "\n".join(lines)


def _likely(explained: Explanation) -> str:
    if explained.likely_s is None:
        return " (no earlier run to tell what is likely)"
    return f", likely {format_duration(explained.likely_s)} by earlier runs"
