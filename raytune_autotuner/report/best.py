"""The winner as files: `best.yaml` for the engine, `launch.sh` to serve it, both with their worth and the verdict."""

from __future__ import annotations

from collections.abc import Iterator

from raytune_autotuner.report import wording
from raytune_autotuner.report.finalists import Contender
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.verdict import Verdict
from raytune_autotuner.report.wording import comment, describe_params, format_number, gain_of, interval, percent
from raytune_autotuner.report.writing import write_text
from raytune_autotuner.score.pareto import scores_of
from raytune_autotuner.study.masking import assignment, mask, mask_line, mask_values
from raytune_autotuner.study.plain import dump_yaml
from raytune_autotuner.study.space import Params, changes, format_value
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialRow


def write_best(
    folder: ResultsFolder, study: Study, row: TrialRow, answer: Verdict, model: str, launch_line: str
) -> None:
    """Write `best.yaml` and `launch.sh` for the winning `row` of `answer`.

    `model` is what the engine is given to load; `launch_line` is the shell line that works on this machine.
    """
    provenance = _provenance(study, row, folder.path.name, answer)
    write_text(folder.best_file, provenance + _engine_config(study, row.params, model))
    script = f'#!/usr/bin/env bash\n{provenance}exec env {mask_line(launch_line)} "$@"\n'
    write_text(folder.launch_file, script, mode=0o755)


def worth(study: Study, row: TrialRow, answer: Verdict) -> list[str]:
    """What a setting was worth, over its restarts where there are some: a text an objective."""
    again = next((one for one in answer.contenders if one.row.number == row.number and one.measured), None)
    return list(_worth_once(study, row, answer.baseline) if again is None else _worth_again(answer, again))


def caution(row: TrialRow, answer: Verdict) -> str | None:
    """What speaks against serving the setting, by its restarts where there are enough of them; None: nothing does."""
    again = next((one for one in answer.contenders if one.row.number == row.number and one.ended), None)
    if again is not None:
        why = wording.why_out(again)
        return None if why is None else f"{'the ' if again.is_baseline else ''}{again.name} {why}"
    if (failure := row.result.failure) is not None:
        return f"this trial failed: {failure.kind} at {failure.stage}"
    if row.state is State.STOPPED:
        return "this trial was ended before its last load, as it could not beat the best one any more"
    if row.state is State.EARLIER:
        return "this setting of an earlier run has not been measured again"
    if row.state is not State.MEASURED:
        return f"this trial has no figures: it is {row.state}"
    return None if row.feasible else "it does not meet every SLO of the study"


def _provenance(study: Study, row: TrialRow, run: str, answer: Verdict) -> str:
    """Comment lines: where this setting comes from and what it was worth."""
    changed = changes(row.params, study.fixed)
    who = f"trial {row.number}" + (f" ({row.name})" if row.name else "")
    lines = [f"Found by raytune_autotuner: study {study.study}, run {run}, {who}."]
    lines += [f"The setting of {row.taken_from}."] if row.taken_from else []
    lines.append(f"Changed against the baseline: {describe_params(changed)}" if changed else "The engine's defaults.")
    lines += [f"{text}." for text in worth(study, row, answer)]
    lines += [f"Caution: {text}." for text in [caution(row, answer)] if text]
    lines += [f"Verdict: {' '.join(filter(None, (answer.sentence, answer.warning)))}"]
    return comment(map(mask, lines))


def _worth_once(study: Study, row: TrialRow, baseline: TrialRow | None) -> Iterator[str]:
    then = () if baseline is None or baseline.number == row.number else scores_of(baseline)
    for i, ((metric, _), score) in enumerate(zip(study.objective.targets, scores_of(row), strict=False)):
        against = f", baseline {format_number(then[i])}" if i < len(then) else ""
        yield f"{metric} {format_number(score)}{against} (one measurement{' each' if against else ''})"


def _worth_again(answer: Verdict, one: Contender) -> Iterator[str]:
    defaults = next((other for other in answer.contenders if other.is_baseline), None)
    noise = "" if answer.noise is None else f", noise {percent(answer.noise)}"
    for i, (metric, _) in enumerate(answer.targets):
        text = f"{metric} {format_number(one.mean(i))}"
        if one.comparisons and defaults is not None:
            found = one.comparisons[i]
            ends = f"{100 * found.confidence:g} % interval {interval(found)}"
            text += f", baseline {format_number(defaults.beside(one).mean(i))}: {gain_of(found)} ({ends})"
        yield f"{text}; means of {len(one.compared)} restarts{noise if i == 0 else ''}"


def _engine_config(study: Study, params: Params, model: str) -> str:
    """The setting for the engine's `--config`; environment variables, which that file cannot hold, as comments."""
    config, env = study.parts(params)
    lines = ["Set these in its environment first:"] if env else []
    lines += [f"  {mask(assignment(name, format_value(value)))}" for name, value in env.items()]
    return comment(lines) + dump_yaml(mask_values({"model": model, **config}))
