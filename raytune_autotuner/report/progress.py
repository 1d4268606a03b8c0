"""How far a study is, in words, and the time that is left.

Works from its rows, whoever runs it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from math import comb

from raytune_autotuner.report.finalists import finalists
from raytune_autotuner.report.status import LiveTrial
from raytune_autotuner.report.wording import format_duration
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialRow


def progress(study: Study, rows: Sequence[TrialRow], detail: str = "") -> str:
    """`5 of 20 trials`, then `6 of 15 restarts to verify`; `detail` stands behind the trials.

    A run that verifies an earlier one has no trials of a search.
    """
    verification = verification_progress(study, rows)
    if any(row.state is State.EARLIER for row in rows):
        return verification or f"0 of {study.verify.starts} restarts to verify"
    done = sum(row.counts for row in rows)
    return ", ".join(filter(None, (f"{done} of {study.search.trials} trials{detail}", verification)))


def verification_progress(study: Study, rows: Sequence[TrialRow]) -> str:
    """`6 of 15 restarts to verify`; empty before the first one."""
    if all(row.verifies is None for row in rows):
        return ""
    done = sum(row.state.teaches for row in rows if row.verifies is not None)
    running = sum(not row.state.finished for row in rows if row.verifies is not None)
    (settings, *_) = _settings_to_verify(study, rows)
    left = round(_restarts_left(study, rows, settings))
    return f"{done} of {done + running + left} restarts to verify"


def time_left_text(times: Sequence[float]) -> str:
    """`about 7 s left`, and what else it may come to; `times` as `times_left_s` has them."""
    if not times:
        return "time left unknown yet"
    told = f"about {format_duration(times[0])} left"
    if len(times) == 1:
        return told
    unless = "something beats the defaults" if times[1] > times[0] else "nothing beats the defaults"
    return f"{told}, or {format_duration(times[1])} if {unless}"


def time_left_s(
    study: Study, rows: Sequence[TrialRow], live: Mapping[int, LiveTrial], concurrency: int, elapsed_s: float
) -> float | None:
    """The likely one of `times_left_s`; None before the first trial has ended."""
    return next(iter(times_left_s(study, rows, live, concurrency, elapsed_s)), None)


def times_left_s(
    study: Study, rows: Sequence[TrialRow], live: Mapping[int, LiveTrial], concurrency: int, elapsed_s: float
) -> tuple[float, ...]:
    """Seconds until the last restart's end, from the trials so far; empty before the first has ended.

    A trial to come takes what the later half of the search's trials took in the mean, failed ones included: a search
    learns to fail less. A restart takes what the best settings and the defaults took. To each comes the time for
    which slots stood idle between trials. While nothing has beaten the defaults there are two times: the likely one
    first, with or without restarts, then the other.
    """
    ended = [row for row in rows if row.state.teaches and "total" in row.result.seconds]
    if not ended:
        return ()
    usual = _seconds([row for row in ended if row.verifies is None] or ended)
    usual = usual[len(usual) // 2 :]
    idle_s = _idle_s(rows, live, concurrency, elapsed_s)
    running = [_rest_s(usual, trial.elapsed_s) for trial in live.values()]
    search_s = 0.0
    if all(row.verifies is None for row in rows):
        trials = max(study.search.trials - sum(row.counts for row in ended) - len(live), 0)
        search_s = _phase_s(running, trials, statistics.fmean(usual) + idle_s, concurrency)
        running = []
    restart_s = statistics.fmean(_seconds(_like_restarts(study, ended))) + idle_s
    restarts = [_restarts_left(study, rows, settings) for settings in _settings_to_verify(study, rows)]
    times = (search_s + _phase_s(running, count, restart_s, concurrency) for count in restarts)
    budget = study.search.time_budget
    most_s = None if budget is None else max(budget - elapsed_s, 0.0) + statistics.fmean(usual)
    return tuple(dict.fromkeys(one if most_s is None else min(one, most_s) for one in times))


def _like_restarts(study: Study, ended: Sequence[TrialRow]) -> Sequence[TrialRow]:
    """The trials that take as long as the restarts will: of the finalists, as far as there are some."""
    return finalists(study, ended, {}) or [row for row in ended if row.state is State.MEASURED] or ended


def _phase_s(running: Sequence[float], waiting: float, each_s: float, concurrency: int) -> float:
    """Until all of a phase have ended, several at a time: the last ones do not end together."""
    loose_s = each_s * (concurrency - 1) / (2 * concurrency) if waiting else 0.0
    return max((sum(running) + waiting * each_s) / concurrency + loose_s, max(running, default=0.0))


def _seconds(rows: Sequence[TrialRow]) -> list[float]:
    return [row.result.seconds["total"] for row in rows]


def _idle_s(rows: Sequence[TrialRow], live: Mapping[int, LiveTrial], concurrency: int, elapsed_s: float) -> float:
    """For how long a slot stood idle before a trial, in the mean."""
    busy = [row.result.seconds["total"] for row in rows if "total" in row.result.seconds]
    busy += [trial.elapsed_s for trial in live.values()]
    return max(elapsed_s * concurrency - sum(busy), 0.0) / len(busy)


def _rest_s(usual: Sequence[float], elapsed_s: float) -> float:
    """What is left of a trial that runs: in the mean what those had left that took longer than it has until now."""
    longer = [seconds for seconds in usual if seconds > elapsed_s]
    return statistics.fmean(longer) - elapsed_s if longer else 0.0


def _restarts_left(study: Study, rows: Sequence[TrialRow], settings: float) -> float:
    """How many of the engine starts of so many settings have not begun."""
    again = [row for row in rows if row.verifies is not None]
    out = {row.verifies for row in again if row.state is State.FAILED}
    begun = sum(row.state.teaches or not row.state.finished for row in again if row.verifies not in out)
    return max((settings - len(out)) * study.verify.restarts - begun, 0)


def _settings_to_verify(study: Study, rows: Sequence[TrialRow]) -> tuple[float, ...]:
    """How many settings are measured again, the baseline among them; while the search runs, as the trials so far tell.

    While nothing has beaten the baseline there may be none in the end, or some, and a mean of both would be wrong in
    either case: they come apart, the likelier one first.
    """
    again = [row for row in rows if row.verifies is not None]
    if any((row.restart or 0) > 0 for row in again):  # so all have had their first start
        return (len({row.verifies for row in again}),)
    chosen, counted = len(finalists(study, rows, {})), [row for row in rows if row.counts]
    left = study.search.trials - len(counted)
    if again or left <= 0 or study.verify.top == 0 or any(row.state is State.EARLIER for row in rows):
        return (chosen,)
    better = max(chosen - 1, 0)
    tried = max(len(counted) - 1, better)  # answers of earlier runs are not counted
    more = dict(enumerate(_more_that_win(tried, better, left)))
    none = 0.0 if better else more.pop(0)
    some = 1 + sum(min(better + k, study.verify.top) * share for k, share in more.items()) / sum(more.values())
    return (some,) if better else (0.0, some) if none >= 0.5 else (some, 0.0)


def _more_that_win(tried: int, won: int, left: int) -> list[float]:
    """The probability that so many (by place) of the trials `left` beat the baseline, as `won` of `tried` did.

    By Laplace's rule: any share of winners is as likely as any other before the first trial.

    >>> _more_that_win(tried=2, won=0, left=1)
    [0.75, 0.25]
    """
    lost = tried - won
    ways = [comb(won + k, k) * comb(lost + left - k, left - k) for k in range(left + 1)]
    return [one / sum(ways) for one in ways]
