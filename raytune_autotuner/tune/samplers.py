"""Which of Optuna's samplers searches a study, and why.

`make_sampler` takes a study file and the number of trials that run at once; it returns the sampler and a reason for
people. All samplers here heed constraints or do not model values at all: CMA-ES would ignore them, so it is missing.
All take one objective or several.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.space import Choice, Parameter, Params, Range, SearchSpace
from raytune_autotuner.study.study import Study
from raytune_autotuner.tune.tell import REFUSED, encode_point, exists, in_order, steps

optuna.logging.set_verbosity(optuna.logging.WARNING)

MAX_GRID = 100_000
"""Settings that a grid may have; more are a mistake, as no study measures them."""
MAX_STARTUP = 10
MAX_POPULATION = 50
_DRAWS = 20
"""Tries to draw another value than the one there is."""
_GP_NEEDS = ("torch", "scipy")


def make_sampler(study: Study, concurrency: int, drawn: int = 0) -> tuple[BaseSampler, str]:
    """The sampler of a study whose trials run `concurrency` at once, and why it was chosen.

    `drawn` is the number of trials that Optuna's storage holds already: a resumed study goes on with another seed,
    as the same one would draw the same settings again.

    Raises `ConfigError` where the sampler asked for cannot work here: `gp` without torch and scipy, `grid` over a
    range without steps.
    """
    name = study.search.sampler
    seed = study.search.seed + drawn
    if name == "auto":
        return _auto(study, concurrency, seed)
    if name == "grid":
        return _grid(study), f"{name}: asked for in search.sampler"
    made = {"tpe": _tpe, "gp": _gp, "nsga2": _nsga2, "random": _random}[name](study, concurrency, seed)
    return made, f"{name}: asked for in search.sampler"


def startup_trials(trials: int) -> int:
    """Random trials before a model is used: a quarter of the budget, at least 1 and at most 10.

    >>> [startup_trials(n) for n in (1, 8, 40, 200)]
    [1, 2, 10, 10]
    """
    return max(1, min(MAX_STARTUP, trials // 4))


def population(trials: int) -> int:
    """NSGA-II's generation: a quarter of the budget, at least 4 and at most 50. Its first is random.

    >>> [population(n) for n in (8, 40, 100, 1000)]
    [4, 10, 25, 50]
    """
    return max(4, min(MAX_POPULATION, trials // 4))


def grid_points(space: SearchSpace, fixed: Params | None = None) -> Iterator[dict[str, Any]]:
    """Every setting of the space that meets its conditions and constraints, each once.

    Raises `ConfigError` for a float range without a step: it has no last setting.
    """
    for point in _expand(in_order(space), space, fixed or {}, {}):
        if space.violated(point, fixed or {}) is None:
            yield {name: point[name] for name in space.by_name if name in point}


def unmeasured(space: SearchSpace, fixed: Params, known: Callable[[Params], bool], seed: int) -> dict[str, Any] | None:
    """A random setting that is not `known` yet, for a search whose sampler repeats itself.

    None where there is none left: then the space is exhausted. None also where it has too many settings to look at.
    """
    if space.size > MAX_GRID:
        return None
    left = [point for point in grid_points(space, fixed) if not known(point)]
    return random.Random(seed).choice(left) if left else None


class StepByStepTPE(TPESampler):
    """TPE whose start goes by single steps from the best setting, the more often the more of the trials have failed.

    A step draws one parameter anew. Where most settings fail, one that differs from a working one in one parameter
    mostly works, and says what that parameter is worth; where most work, random ones say more. docs/search.md has the
    comparison.
    """

    def __init__(self, *, seed: int, n_startup_trials: int, **options: Any) -> None:
        super().__init__(seed=seed, n_startup_trials=n_startup_trials, **options)
        self._startup = n_startup_trials
        self._steps = RandomSampler(seed=seed)
        self._source = random.Random(seed)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The values of the parameters in `search_space`; none of them where all are drawn at random."""
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        best = self._best(study, ended) if search_space and len(ended) < self._startup else None
        if best is None:
            return super().sample_relative(study, trial, search_space)
        name, values = self._source.choice([*search_space]), best.params
        drawn = (self._steps.sample_independent(study, trial, name, search_space[name]) for _ in range(_DRAWS))
        step = next((value for value in drawn if value != values.get(name)), values.get(name))
        return {**{known: values[known] for known in search_space if known in values}, name: step}

    def _best(self, study: optuna.Study, ended: Sequence[FrozenTrial]) -> FrozenTrial | None:
        """The best feasible trial (by the first objective), as often as a started trial was not feasible; else None."""
        started = [one for one in ended if one.user_attrs.get("state") != REFUSED]
        worked = [one for one in started if "values" in one.user_attrs and _feasible(one)]
        if not worked or self._source.random() >= 1 - len(worked) / len(started):
            return None
        pick = max if study.directions[0] is StudyDirection.MAXIMIZE else min
        return pick(worked, key=lambda one: one.values[0])


def _feasible(trial: FrozenTrial) -> bool:
    return all(value <= 0 for value in trial.constraints.values())


class Grid(BaseSampler):
    """Every setting of the space once, in an order shuffled by the seed; points that were queued count as visited.

    Optuna's own grid ends a study by `stop()`, which nothing hears under ask and tell, and knows no conditions. Here a
    suggestion beyond the grid starts over, and the searcher sees that it knows all of them.
    """

    def __init__(self, space: SearchSpace, fixed: Params | None = None, seed: int = 0) -> None:
        points = list(itertools.islice(grid_points(space, fixed), MAX_GRID + 1))
        if len(points) > MAX_GRID:
            raise ConfigError(f"search.sampler grid: the space has more than {MAX_GRID:,} settings; use tpe or random.")
        if not points:
            raise ConfigError("search.sampler grid: no setting of the space meets its constraints.")
        self._points = [encode_point(space, point) for point in points]
        random.Random(seed).shuffle(self._points)
        self._given: dict[int, Mapping[str, Any]] = {}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Nothing is sampled jointly: `before_trial` has fixed the whole setting."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See `infer_relative_search_space`."""
        return {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Fix the trial's setting: the first that no other trial has."""
        self._given[trial.number] = self._next(study, trial.number) or self._points[trial.number % len(self._points)]

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The value of the setting that `before_trial` fixed."""
        given = self._given[trial.number]
        if param_name in given:
            return given[param_name]
        # A queued point may hold a part of a setting under other conditions; any value of the grid completes it.
        return next(point[param_name] for point in self._points if param_name in point)

    def _next(self, ot_study: optuna.Study, number: int) -> Mapping[str, Any] | None:
        seen = {_key(t.params) for t in ot_study.get_trials(deepcopy=False) if t.number != number}
        return next((point for point in self._points if _key(point) not in seen), None)


def _auto(study: Study, concurrency: int, seed: int) -> tuple[BaseSampler, str]:
    size, trials = study.space.size, study.search.trials
    if size <= trials:
        return _grid(study), f"grid: {trials} trials reach all {size:.0f} settings of the space"
    startup = startup_trials(trials)
    grouped = ", grouped by condition" if study.space.conditional else ""
    start = f"the first {startup} of them at random or a step from what works"
    reason = f"tpe{grouped}: {trials} trials of {_count(size)} settings, {start}"
    return _tpe(study, concurrency, seed), f"{reason}{_why_not_nsga2(study)}"


def _why_not_nsga2(study: Study) -> str:
    """Measured on two landscapes of throughput against latency; a study of engines has no more trials than that."""
    several = len(study.objective.targets)
    return f"; for {several} objectives, as nsga2 finds less of the front in up to 400 trials" if several > 1 else ""


def _count(size: float) -> str:
    return f"{size:,.0f}" if size < 1e9 else "very many"


def _tpe(study: Study, concurrency: int, seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # `group` is the only way for conditional spaces
        return StepByStepTPE(
            seed=seed,
            multivariate=True,
            group=study.space.conditional,
            constant_liar=concurrency > 1,
            n_startup_trials=startup_trials(study.search.trials),
        )


def _gp(study: Study, concurrency: int, seed: int) -> BaseSampler:
    if lacking := [module for module in _GP_NEEDS if importlib.util.find_spec(module) is None]:
        raise ConfigError(
            f"search.sampler gp needs {' and '.join(lacking)}, which this Python does not have: "
            f"`pip install {' '.join(lacking)}`, or write sampler: tpe."
        )
    if study.space.conditional:
        raise ConfigError("search.sampler gp cannot search parameters with a condition (when:); write sampler: tpe.")
    startup = startup_trials(study.search.trials)
    return GPSampler(seed=seed, n_startup_trials=startup, deterministic_objective=False)


def _nsga2(study: Study, concurrency: int, seed: int) -> BaseSampler:
    return NSGAIISampler(population_size=population(study.search.trials), seed=seed)


def _random(study: Study, concurrency: int, seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


def _grid(study: Study) -> BaseSampler:
    return Grid(study.space, study.fixed, study.search.seed)


def _expand(
    waiting: Sequence[Parameter], space: SearchSpace, fixed: Params, point: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    if not waiting:
        yield point
        return
    parameter, *rest = waiting
    if not exists(parameter, space, {**fixed, **point}):
        yield from _expand(rest, space, fixed, point)
        return
    for value in _values(parameter):
        yield from _expand(rest, space, fixed, {**point, parameter.name: value})


def _values(parameter: Parameter) -> Iterator[Any]:
    spec = parameter.distribution
    if isinstance(spec, Choice):
        yield from spec.values
        return
    if spec.size == float("inf"):
        raise ConfigError(f"search_space.{parameter.name}: a grid needs a step in a float range, such as step: 0.05.")
    yield from (_step(spec, index) for index in range(steps(spec) + 1))


def _step(spec: Range, index: int) -> int | float:
    value = spec.low + index * (spec.step or 1)
    return int(value) if spec.type == "int" else round(float(value), 12)


def _key(encoded: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    return frozenset((name, type(value).__name__, value) for name, value in encoded.items())  # type: ignore[misc]
