"""The words of a verdict: numbers, gains with their intervals, and the sentences that people act on.

What they say is decided in `verdict`; here it is only put into text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from raytune_autotuner.report.finalists import Contender, Targets
from raytune_autotuner.score.comparison import MAX_RESTARTS, Comparison, TooNoisy
from raytune_autotuner.score.pareto import scores_of
from raytune_autotuner.study.errors import printable
from raytune_autotuner.study.space import Params, readable
from raytune_autotuner.study.trial import BASELINE, State, TrialRow

_NONE = "-"


def describe_params(params: Params) -> str:
    """`{max-num-seqs: 8, block-size: 64}`: one line, whatever the values are."""
    return "{" + ", ".join(f"{name}: {readable(value)}" for name, value in params.items()) + "}"


def comment(texts: Iterable[str]) -> str:
    """`texts` as comment lines of a shell script or of YAML, also with several lines or control characters in them."""
    return "".join(f"# {printable(line)}\n" for text in texts for line in text.splitlines())


def verification_of(row: TrialRow, restarts: int) -> str:
    """`verify trial 7, 2 of 5`; empty for a trial of the search."""
    if row.verifies is None:
        return ""
    return f"verify trial {row.verifies}, {(row.restart or 0) + 1} of {restarts}"


def format_number(value: float) -> str:
    """Four significant digits, whole numbers whole.

    >>> format_number(126.4412), format_number(0.04321), format_number(12345.6)
    ('126.4', '0.04321', '12,346')
    """
    if value == 0 or not abs(value) < float("inf"):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """Short text for people.

    >>> format_duration(7.4), format_duration(125), format_duration(7300)
    ('7 s', '2:05', '2:01:40')
    """
    whole = int(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{whole} s"


def percent(share: float, sign: bool = False) -> str:
    """A share for people, to a tenth of a percent; `sign`: with a plus where it is positive.

    >>> percent(0.02934), percent(0.41234, sign=True), percent(12.0)
    ('2.9 %', '+41.2 %', '1,200 %')
    """
    digits = 0 if abs(share) >= 10 else 1
    return f"{100 * share:{'+' if sign else ''},.{digits}f} %"


def signed(value: float) -> str:
    """With a plus where it is positive."""
    return f"{'+' if value > 0 else ''}{format_number(value)}"


def interval(comparison: Comparison) -> str:
    """`+36.1 to +46.4 %`; in the metric's unit where there is no share of the baseline's score."""
    if comparison.scale == "difference":
        return f"{signed(comparison.low)} to {signed(comparison.high)}"
    low, high = percent(comparison.low, sign=True), percent(comparison.high, sign=True)
    return f"{low.removesuffix(' %')} to {high}"


def gain_of(comparison: Comparison) -> str:
    """`+41.2 %`, or a difference in the metric's unit."""
    return signed(comparison.gain) if comparison.scale == "difference" else percent(comparison.gain, sign=True)


def contender_cells(contenders: Sequence[Contender], targets: Targets) -> list[list[str]]:
    """The settings that were measured again as a table, its head first: a line a setting and objective."""
    head = ["setting", "metric", "mean", "spread", "gain", f"{_level(contenders)} interval"]
    most = max((len(one.compared) for one in contenders if one.comparisons), default=0)
    return [
        head,
        *(_cells(one, targets, i, most) for one in contenders for i in range(len(targets) if one.measured else 1)),
    ]


def why_out(one: Contender) -> str | None:
    """Why a setting that was measured again cannot be recommended; None where it can."""
    if one.failed is not None:
        kind = one.failed.result.failure.kind if one.failed.result.failure else State.FAILED
        return f"failed when started again ({kind} in trial {one.failed.number})"
    if not one.ended:
        return f"{'were' if one.is_baseline else 'was'} measured again too few times"
    if not one.holds:
        return (
            f"{'miss' if one.is_baseline else 'misses'} an SLO (median violation {format_number(one.violation or 0.0)})"
        )
    return None


# Sentences on settings that were measured again


def gain(
    winner: Contender,
    defaults: Contender,
    finalists: Sequence[Contender],
    level: Sequence[Contender],
    targets: Targets,
) -> str:
    """The recommendation of a setting that beats the defaults.

    `level` is the best mean, and then those that cannot be told from it; empty with several objectives.
    """
    text = f"Run {winner.name}: {figures(winner, defaults, targets)}."
    if level and level[0] is not winner:
        text += f" {_name(level[0])} cannot be told from it; it changes less."
    elif ties := level[1:]:
        text += f" {_names(ties)} cannot be told from it."
    if winner.missed:
        text += f" {_name(winner)} missed an SLO in {winner.missed} of {_restarts(winner)}."
    return f"{text} {_sentence(_out(finalists))}".rstrip()


def figures(one: Contender, defaults: Contender, targets: Targets) -> str:
    """What a setting is worth beside the defaults, in every objective, and what that rests on."""
    parts = [_compared(one, defaults.beside(one), i, metric) for i, (metric, _) in enumerate(targets)]
    return f"{'; '.join(parts)}, {_pairs([one])}, {_noise(defaults)}"


def no_gain(defaults: Contender, finalists: Sequence[Contender], targets: Targets) -> str:
    """The advice to keep the defaults."""
    out = _out(finalists)
    compared = [one for one in finalists if one.holds and one.comparisons]
    if not compared:
        return f"Keep the defaults: none of the finalists held up. {_sentence(out)}".rstrip()
    better = any(one.better for one in finalists if one.holds)
    head = "Keep the defaults: they are the better compromise." if better else "No significant gain: keep the defaults."
    text = f"{head} {_sentence([_undecided(one, targets) for one in compared])}"
    return f"{text} {_pairs(compared)}, {_noise(defaults)}. {_sentence(out)}".rstrip()


def without_defaults(
    winner: Contender | None,
    defaults: Contender | None,
    baseline: TrialRow | None,
    finalists: Sequence[Contender],
    targets: Targets,
) -> str:
    """The recommendation where the defaults do not work: of a setting that does, or of none."""
    if winner is None or not winner.holds:
        return _nothing_holds(winner, defaults, finalists)
    values = "; ".join(f"{metric} {format_number(winner.mean(i))}" for i, (metric, _) in enumerate(targets))
    kept = f"in {len(winner.measured) - winner.missed} of" if winner.missed else "over"
    own = winner.spread()
    noise = "" if own is None else f", which differ by {percent(own)}"
    reason = _not_measured(baseline) if defaults is None else why_out(defaults)
    if defaults is not None and defaults.failed is None:
        reason = f"{reason}, at {format_number(defaults.mean())}"
    return f"Run {winner.name}: {values} and every SLO met {kept} {_restarts(winner)}{noise}; the defaults {reason}."


def warning(one: Contender, noisy: TooNoisy) -> str:
    """That the machine is too noisy to decide, or that the scores come in steps that are too wide."""
    comparison = one.comparisons[0]
    size = percent(noisy.gain) if comparison.scale != "difference" else format_number(noisy.gain)
    noise = "" if comparison.scale == "difference" else f" of {percent(comparison.noise)}, beyond what drifts for all,"
    needed = f"more than {MAX_RESTARTS:,}" if noisy.restarts is None else f"about {noisy.restarts}"
    if comparison.in_steps:
        return (
            f"The scores come in steps that are too wide to decide: a gain of {size} could not be told from a step by "
            f"{comparison.pairs} restarts. Use {needed} restarts (verify.restarts), "
            "or a finer load: more levels or requests."
        )
    return (
        f"The noise between restarts{noise} is too large to decide: a gain of {size} could not be told from it by "
        f"{comparison.pairs} restarts. Use a quieter machine or more requests, or {needed} restarts (verify.restarts)."
    )


def mixed_hardware(measured: Mapping[str, int]) -> str | None:
    """That scores come from different hardware; None where they do not."""
    if len(measured) < 2:
        return None
    most_first = sorted(measured.items(), key=lambda pair: (-pair[1], pair[0]))
    return (
        "The trials ran on different hardware, so their scores differ by more than their settings: "
        f"{'; '.join(f'{count} on {name}' for name, count in most_first)}. "
        "Name one kind with resources.accelerator_type or resources.node_labels."
    )


def ceiling(highest: float, trials: Sequence[int]) -> str | None:
    """That settings keep the SLOs at the highest load level that was asked for; None where none does."""
    if not trials:
        return None
    where = f"{len(trials)} trials, which cannot be told apart" if len(trials) > 1 else f"trial {trials[0]}"
    return f"The highest load level, {highest:g}, kept the SLOs in {where}: add higher ones to the workload."


# Sentences on single measurements


def single(winner: TrialRow, baseline: TrialRow | None, gain: float | None, metric: str, measured: int) -> str:
    """The recommendation by one measurement a setting."""
    value = f"{metric} {format_number(winner.score or 0.0)}"
    if winner.name == BASELINE:
        others = (
            "it was the only setting measured" if measured == 1 else f"none of {measured - 1} other settings beat it"
        )
        return f"Keep the defaults: {value}, {others}. Each was measured once."
    caution = "Each was measured once, so a small gain may be noise."
    if baseline is None or baseline.state is not State.MEASURED or baseline.score is None:
        return f"Run trial {winner.number}: {value}; the defaults have no score to compare it with. Measured once."
    defaults = f"{format_number(baseline.score)} with the defaults"
    if not baseline.feasible:
        return f"Run trial {winner.number}: {value} and every SLO met; the defaults miss one ({defaults}). {caution}"
    share = "" if gain is None else f", {100 * gain:.3g} % better (x{(winner.score or 0.0) / baseline.score:.2f})"
    return f"Run trial {winner.number}: {value} against {defaults}{share}. {caution}"


def knee(winner: TrialRow, baseline: TrialRow | None, front: Sequence[int], targets: Targets) -> str:
    """The recommendation among several objectives by one measurement a setting."""
    then = scores_of(baseline) if baseline is not None and baseline is not winner else ()
    parts = [
        f"{metric} {format_number(score)}" + (f" ({format_number(then[i])} with the defaults)" if then else "")
        for i, ((metric, _), score) in enumerate(zip(targets, scores_of(winner), strict=True))
    ]
    who = "Keep the defaults" if winner.name == BASELINE else f"Run trial {winner.number}"
    others = [str(number) for number in front if number != winner.number]
    with_them = f"trial{'s' if len(others) > 1 else ''} {', '.join(others)}"
    place = f"the knee of a Pareto front with {with_them}" if others else "no other setting is as good"
    return f"{who}: {', '.join(parts)}; {place}. Each was measured once, so small gains may be noise."


def none_feasible(winner: TrialRow, metric: str, measured: int) -> str:
    """That every setting misses an SLO, and which one comes closest."""
    who = "the defaults come" if winner.name == BASELINE else f"trial {winner.number} comes"
    settings = "The one setting measured misses" if measured == 1 else f"All {measured} settings measured miss"
    return (
        f"{settings} an SLO; {who} closest (violation {format_number(winner.violation or 0.0)}, "
        f"{metric} {format_number(winner.score or 0.0)}). Relax the SLO or lower the load. Each was measured once."
    )


def nothing_measured(rows: Sequence[TrialRow]) -> str:
    """That there is no figure at all, and what to do."""
    failed = sum(row.state is State.FAILED for row in rows)
    if not failed:
        return "Nothing was measured: no trial ended. Run the study again, with more time."
    trials = "the only trial" if failed == 1 else f"all {failed} trials"
    return (
        f"Nothing was measured: {trials} failed. Follow the remedies of the failures, then lower the load, "
        "lengthen trial.timeout_s or narrow search_space to safer ranges."
    )


# Parts


def _nothing_holds(closest: Contender | None, defaults: Contender | None, finalists: Sequence[Contender]) -> str:
    out = [f"{'the defaults' if one.is_baseline else one.name} {why_out(one)}" for one in (defaults, *finalists) if one]
    advice = "Raise verify.top to measure more settings again, relax the SLO or lower the load."
    nearest = "" if closest is None else f" {_name(closest)} {_come(closest)} closest."
    return f"No setting held up when it was measured again. {_sentence(out)}{nearest} {advice}"


def _not_measured(baseline: TrialRow | None) -> str:
    failure = None if baseline is None else baseline.result.failure
    if baseline is None or failure is None:
        return "were not measured"
    if baseline.state is State.LOST:
        return f"could not be measured, by no fault of theirs ({failure.kind})"
    return f"failed ({failure.kind})"


def _cells(one: Contender, targets: Targets, i: int, most: int) -> list[str]:
    """A setting's line; one that is compared in fewer restarts than the `most` says so."""
    comparison = one.comparisons[i] if one.comparisons else None
    name = one.name if one.holds else f"{one.name} (out)"
    if comparison is not None and comparison.pairs < most:
        name = f"{name}, {comparison.pairs} restarts"
    spread = one.spread(i) if one.measured else None
    return [
        name if i == 0 else "",
        targets[i][0],
        format_number(one.mean(i)) if one.measured else _NONE,
        _NONE if spread is None else percent(spread),
        _NONE if comparison is None else gain_of(comparison),
        _NONE if comparison is None else interval(comparison),
    ]


def _out(finalists: Sequence[Contender]) -> list[str]:
    """Which finalists cannot win against defaults that hold, and why."""
    out = [one for one in finalists if not (one.holds and one.comparisons)]
    return [f"{one.name} {why_out(one) or 'shares too few restarts with the defaults'}" for one in out]


def _level(contenders: Sequence[Contender]) -> str:
    levels = [comparison.confidence for one in contenders for comparison in one.comparisons]
    return f"{100 * (levels[0] if levels else 0.95):g} %"


def _compared(winner: Contender, defaults: Contender, i: int, metric: str) -> str:
    comparison = winner.comparisons[i]
    values = f"{metric} {format_number(winner.mean(i))} against {format_number(defaults.mean(i))} with the defaults"
    ends = f"{100 * comparison.confidence:g} % interval {interval(comparison)}"
    if comparison.scale == "difference":
        return f"{values} ({ends.replace('interval', 'interval of the gain')})"
    if not (comparison.better or comparison.worse):
        return f"{values}, not told apart ({ends})"
    way = "better" if comparison.better else "worse"
    return f"{values}, {percent(abs(comparison.gain))} {way} ({ends})"


def _undecided(one: Contender, targets: Targets) -> str:
    gains = [
        f"{metric + ' ' if len(targets) > 1 else ''}{gain_of(c)} ({100 * c.confidence:g} % interval {interval(c)})"
        for (metric, _), c in zip(targets, one.comparisons, strict=True)
    ]
    return f"{one.name}: {', '.join(gains)}"


def _restarts(one: Contender) -> str:
    return f"{len(one.measured)} restarts"


def _pairs(compared: Sequence[Contender]) -> str:
    """`5 restarts each`: those that a finalist and the defaults have in common."""
    counts = sorted({one.comparisons[0].pairs for one in compared})
    return f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} restarts each"


def _noise(defaults: Contender) -> str:
    own = defaults.spread()
    return "noise unknown" if own is None else f"noise {percent(own)}"


def _sentence(parts: Sequence[str]) -> str:
    """`trial 7 ...; trial 9 ...` as a sentence; nothing from nothing."""
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _names(several: Sequence[Contender]) -> str:
    names = " and ".join(one.name for one in several)
    return f"{names[0].upper()}{names[1:]}"


def _name(one: Contender) -> str:
    return "The defaults" if one.is_baseline else one.name.capitalize()


def _come(one: Contender) -> str:
    return "come" if one.is_baseline else "comes"
