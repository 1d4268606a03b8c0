"""Whether the loads of a study can show what it asks of them, told from their numbers before anything is started.

Each has so many requests of so many tokens: are they samples enough for every percentile, do they reach the number in
flight, do they fit into the engine's context and into the trial's time? Which metrics there are, `checks.py` knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from raytune_autotuner.load.workload import arrivals_s, lengths, levels, longest, longest_possible
from raytune_autotuner.score.metrics import samples_needed
from raytune_autotuner.score.slo import scans_loads
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.study import Study, Workload

Loads: TypeAlias = Mapping[str, Sequence[tuple[int, int]]]
"""Load level's label to the tokens of prompt and answer of the requests of one round."""

_LENGTH = "max-model-len"
_KNOWS_LENGTH = ("vllm", "simulated")
_GAPS = ("tpot_ms", "itl_ms")
"""Latencies between tokens, of which an answer of one token has none."""


def check_loads(study: Study) -> None:
    """Raise `ConfigError` where a load cannot show what the study asks of it."""
    loads = {level.label: lengths(study.workload, level) for level in levels(study.workload)}
    _check_in_flight(study.workload)
    for key, name in _rested_on(study):
        _check_samples(study.workload, loads, key, name)
    _check_fit(study)
    _check_time(study)


def _check_in_flight(load: Workload) -> None:
    most = max(load.concurrency, default=0)
    if load.requests < most:
        raise ConfigError(
            f"workload.concurrency: {most} requests are never in flight at once where a load has {load.requests}.\n"
            f"Raise workload.requests to several times {most}, or lower the concurrency."
        )


def _rested_on(study: Study) -> Iterator[tuple[str, str]]:
    """Each metric that the study rests on, with its key."""
    objective = study.objective
    yield from ((f"objective.{direction}: {name}", name) for name, direction in objective.targets)
    if objective.attainment is None:
        for latency, limits in objective.slo.items():
            yield from ((f"objective.slo.{latency}.{stat}", f"{latency}_{stat}") for stat in limits)


def _check_samples(load: Workload, loads: Loads, key: str, name: str) -> None:
    """Raise `ConfigError` where there are fewer samples than 95 % confidence needs, all requests completed."""
    base, _, at = name.partition("@")
    between_tokens = base.startswith(_GAPS)
    needed = samples_needed(base) or int(between_tokens)
    for label in [at] if at else loads:
        if len(loads[label]) * load.rounds < needed:
            raise ConfigError(_too_few(load, len(loads[label]), key, base, needed))
        gaps = sum(answer > 1 for _, answer in loads[label])
        if between_tokens and gaps * load.rounds < needed:
            raise ConfigError(
                f"{key}: rests on answers of two tokens or more and needs {needed} at a load level, but {label} has "
                f"{gaps * load.rounds} ({gaps} of {len(loads[label])} requests, rounds {load.rounds}).\n"
                "An answer of one token has no time between tokens; ask for longer answers, or for more of them."
            )


def _too_few(load: Workload, requests: int, key: str, name: str, needed: int) -> str:
    short = requests < load.requests
    said = f"the trace's {requests}" if short else f"requests {requests}"
    more = "take a longer trace" if short else f"Raise workload.requests to {-(-needed // load.rounds)}"
    rounds = f"workload.rounds to {-(-needed // requests)}"
    return (
        f"{key}: a {name.rpartition('_')[2]} needs {needed} requests at a load level (95 % confidence), but "
        f"{said} x rounds {load.rounds} are {requests * load.rounds}.\n"
        f"{f'Raise {rounds}, or {more}' if short else f'{more} or {rounds}'}, with some to spare for requests that "
        "fail."
    )


def _check_fit(study: Study) -> None:
    """Raise `ConfigError` for a request that is longer than what the engine is told to take."""
    most = study.engine.args.get(_LENGTH)
    if study.engine.kind not in _KNOWS_LENGTH or type(most) is not int or most < 1 or _LENGTH in study.space.by_name:
        return
    if sum(longest_possible(study.workload)) <= most:
        return
    restarts = study.verify.restarts if study.verify.top else 0
    refined = restarts > 0 and scans_loads(study.objective)
    prompt, answer = longest(study.workload, restarts, refined)
    if prompt + answer > most:
        raise ConfigError(
            f"engine.args.{_LENGTH}: {most} tokens do not hold the longest request of the workload, {prompt} of "
            f"prompt and {answer} of answer.\nRaise it to {prompt + answer} or more, or send shorter requests."
        )


def _check_time(study: Study) -> None:
    """Raise `ConfigError` where requests still arrive when the trial's time is up."""
    load, limit_s = study.workload, study.trial.timeout_s
    needed_s = sum(arrivals_s(load, level, "warmup") + load.rounds * arrivals_s(load, level) for level in levels(load))
    if needed_s >= limit_s:
        raise ConfigError(
            f"trial.timeout_s: {limit_s:g} s are too short: until the last request has arrived, the loads and their "
            f"warm-ups take {needed_s:,.0f} s.\n"
            "Raise it, with time for the engine's start to spare, or send fewer requests."
        )
