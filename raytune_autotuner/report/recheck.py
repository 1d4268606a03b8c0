"""Whether what an earlier run claims is still so: its claim, and the verdict on its setting measured again.

`claim_of` reads the claim from the earlier run's folder; `recheck` holds a verdict on restarts of that setting and of
the defaults against it. How a gain is told from noise is `score/comparison.py`'s; the study's own verdict stays beside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from raytune_autotuner.report import wording
from raytune_autotuner.report.differences import differences
from raytune_autotuner.report.finalists import Contender, Targets, contenders
from raytune_autotuner.report.results import NO_ROW, ResultsFolder
from raytune_autotuner.report.status import read_status
from raytune_autotuner.report.verdict import Verdict, baseline_of, defaults_of, study_verdict
from raytune_autotuner.report.writing import read_json, write_json
from raytune_autotuner.score.comparison import Comparison, too_noisy
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.space import Params
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import BASELINE, TrialRow

_MATTERS = ("model", "engine", "hardware", "autotuner", "workload")
_NO_MATTER = ("price_per_hour",)


@dataclass(frozen=True, slots=True)
class Gain:
    """A gain over the defaults in one objective, as an earlier run had measured it."""

    metric: str
    gain: float
    """As a share of the defaults' score, positive is better; in the metric's own unit where `shared` is false."""
    low: float | None = None
    """Lower end of its interval; None where it rests on one measurement each."""
    high: float | None = None
    confidence: float | None = None
    shared: bool = True

    @property
    def least(self) -> float:
        """The smallest gain that the run's figures allow."""
        return self.gain if self.low is None else self.low

    def __str__(self) -> str:
        if self.low is None or self.high is None or self.confidence is None:
            return f"{self._text(self.gain)} (one measurement each)"
        ends = f"{self._text(self.low).removesuffix(' %')} to {self._text(self.high)}"
        return f"{self._text(self.gain)} ({100 * self.confidence:g} % interval {ends})"

    def _text(self, value: float) -> str:
        return wording.percent(value, sign=True) if self.shared else wording.signed(value)


@dataclass(frozen=True, slots=True)
class Claim:
    """What an earlier run says of one of its settings."""

    run: str
    """The name of its results folder."""
    trial: int
    params: Params
    gains: tuple[Gain, ...]
    """For each objective; empty where the setting or the defaults were not measured."""
    sentence: str
    """The run's whole verdict."""
    failed: str | None = None
    """The kind of the failure with which the setting ended then."""

    @property
    def source(self) -> str:
        """`trial 7 of RUN`."""
        return f"trial {self.trial} of {self.run}"

    @property
    def then(self) -> str:
        """What was claimed, in short."""
        if self.failed is not None:
            return f"it failed ({self.failed})"
        if not self.gains:
            return "no gain was measured"
        several = len(self.gains) > 1
        return ", ".join(f"{gain.metric} {gain}" if several else str(gain) for gain in self.gains)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Claim:
        """The reverse of `to_dict`."""
        return cls(**{**values, "gains": tuple(Gain(**gain) for gain in values["gains"])})


@dataclass(frozen=True)
class Recheck(Verdict):
    """A verdict that says whether an earlier run's claim is so: its sentence does, and `holds`."""

    claim: Claim = field(kw_only=True)
    holds: bool | None = None
    """Whether the setting works and still beats the defaults; None: this could not be told."""
    different: tuple[str, ...] = ()
    """What is not as it was then, a line each."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `verdict.json`."""
        told = {"holds": self.holds, "claim": self.claim.to_dict(), "different": list(self.different)}
        return {**Verdict.to_dict(self), **told}


def claim_of(folder: ResultsFolder, number: int | None = None) -> Claim:
    """What the run in `folder` says of trial `number` (None: of its winner).

    Raises `ConfigError` where there is nothing to verify.
    """
    study, rows = folder.load_study(), folder.read_rows()
    answer = said(folder, study, rows)
    row = _claimed(folder, answer, number)
    targets = study.objective.targets
    failure = row.result.failure
    return Claim(
        folder.path.name,
        row.number,
        dict(row.params),
        _gains(row, rows, targets),
        answer.sentence,
        None if failure is None else str(failure.kind),
    )


def recheck(answer: Verdict, rows: Sequence[TrialRow], claim: Claim, different: Sequence[str] = ()) -> Recheck:
    """Whether `claim` holds, by the `rows` that measure its setting and the defaults again, and the verdict on them."""
    again = contenders(rows, answer.targets)
    defaults = next((one for one in again if one.is_baseline), None)
    setting = next((one for one in again if not one.is_baseline), None)
    holds, sentence = _judged(answer, setting, defaults, claim)
    given = {part.name: getattr(answer, part.name) for part in fields(Verdict)}
    text = f"{sentence} Then: {claim.then}."
    return Recheck(**{**given, "sentence": text}, claim=claim, holds=holds, different=tuple(different))


@dataclass(frozen=True, slots=True)
class Said:
    """What a run answers, in short."""

    winner: int | None
    """Number of its trial."""
    sentence: str
    warning: str | None


def said(folder: ResultsFolder, study: Study, rows: Sequence[TrialRow]) -> Said:
    """The answer that a run wrote down at its end; of one that runs or was killed, what its rows say."""
    written = written_verdict(folder)
    if written is not None:
        return Said(written["winner"], written["sentence"], written["warning"])
    answer = answer_of(folder, study, rows)
    return Said(None if answer.winner is None else answer.winner.number, answer.sentence, answer.warning)


def written_verdict(folder: ResultsFolder) -> dict[str, Any] | None:
    """`verdict.json` of a run that has ended: until then, one that is there was written before the run was resumed."""
    status = read_status(folder)
    return folder.read_verdict() if status is None or status.phase != "running" else None


def answer_of(
    folder: ResultsFolder, study: Study, rows: Sequence[TrialRow], versions: Mapping[str, Any] | None = None
) -> Verdict:
    """The verdict on a run's rows, of whichever kind the run in `folder` is; None: its `versions` are read there."""
    known = folder.read_versions() if versions is None else versions
    answer, noted = study_verdict(study, rows, defaults_of(study, known)), _read(folder)
    return answer if noted is None else recheck(answer, rows, noted[0], noted[1])


def note_claim(folder: ResultsFolder, claim: Claim, earlier: ResultsFolder) -> None:
    """Write down that the run in `folder` verifies `claim` of the run in `earlier`."""
    write_json(folder.verifies_file, {"claim": claim.to_dict(), "different": what_is_different(earlier, folder)})


def claim_notes(folder: ResultsFolder) -> list[str]:
    """What is verified, and what is different now: lines for people; none where the run is a search."""
    noted = _read(folder)
    if noted is None:
        return []
    claim, different = noted
    lines = [f"different: {one}" for one in different] or ["different: nothing; engine, machine and load are the same"]
    return [f"verifies {claim.source}; then: {claim.then}", *lines]


def read_claim(folder: ResultsFolder) -> Claim | None:
    """The claim that the run in `folder` verifies; None where it is a search."""
    noted = _read(folder)
    return None if noted is None else noted[0]


def what_is_different(then: ResultsFolder, now: ResultsFolder) -> list[str]:
    """What figures rest on and is not as it was: `vllm: 0.31.0 then, 0.32.0 now`."""
    found = differences([(run.load_study(), run.read_versions()) for run in (then, now)])
    told = [one for one in found if one.about in _MATTERS and one.name not in _NO_MATTER]
    return [f"{one.name}: {one.values[0]} then, {one.values[1]} now" for one in told]


def _read(folder: ResultsFolder) -> tuple[Claim, list[str]] | None:
    if not folder.verifies_file.exists():
        return None
    noted = read_json(folder.verifies_file) or {}
    try:
        return Claim.from_dict(noted["claim"]), list(noted["different"])
    except NO_ROW as error:
        remedy = "Put a copy of it back, or take it away: the run is then read as a search."
        raise ConfigError(f"{folder.verifies_file}: is broken; it says what the run verifies.\n{remedy}") from error


# The claim


def _claimed(folder: ResultsFolder, answer: Said, number: int | None) -> TrialRow:
    """The trial to verify."""
    wanted = answer.winner if number is None else number
    if wanted is None:
        raise ConfigError(f"{folder.place}: has no winner to verify: {answer.sentence}\nName a setting with --trial N.")
    row = folder.read_row(wanted)
    if row.verifies is not None:
        raise ConfigError(f"--trial {number}: is a restart of trial {row.verifies}; write --trial {row.verifies}.")
    if row.name == BASELINE:
        why = "are what every setting is held against" if number is not None else "are what it recommends"
        raise ConfigError(
            f"{folder.place}: there is nothing to verify: the defaults {why}.\nName another setting with --trial N."
        )
    return row


def _gains(row: TrialRow, rows: Sequence[TrialRow], targets: Targets) -> tuple[Gain, ...]:
    """By its restarts where it had some, else by one measurement."""
    again = next((one for one in contenders(rows, targets) if one.row.number == row.number), None)
    if again is not None and again.comparisons:
        return tuple(_gain(metric, found) for (metric, _), found in zip(targets, again.comparisons, strict=True))
    baseline = baseline_of(rows)
    if baseline is None or not (baseline.score and row.score is not None) or len(targets) > 1:
        return ()
    change = (row.score - baseline.score) / abs(baseline.score)
    return (Gain(targets[0][0], change if targets[0][1] == "maximize" else -change),)


def _gain(metric: str, found: Comparison) -> Gain:
    return Gain(metric, found.gain, found.low, found.high, found.confidence, found.scale != "difference")


# What became of it


def _judged(
    answer: Verdict, setting: Contender | None, defaults: Contender | None, claim: Claim
) -> tuple[bool | None, str]:
    """Whether the claim holds, and the sentence that says so."""
    who = f"the setting of {claim.source}"
    told = [f"{who if one is setting else 'the defaults'} {why}" for one in (setting, defaults)
            if one is not None and (why := wording.why_out(one))]  # fmt: skip
    reasons = "; ".join(told)
    if setting is None or defaults is None or not answer.verified or (setting.failed and defaults.failed):
        return None, f"No answer: {reasons or 'too little was measured'}."
    if not setting.holds:
        return False, f"Does not hold: {reasons}."
    if not defaults.holds:
        return True, f"Holds: {who} meets every SLO, {reasons}."
    if not setting.comparisons:
        return None, "No answer: too few restarts in common."
    figures = f"{who} gives {wording.figures(setting, defaults, answer.targets)}"
    if not answer.keeps_defaults:
        return True, f"Holds: {figures}.{_changed(setting, claim)}"
    if _open(setting, claim):
        return None, f"Undecided: {figures}."
    return False, f"Does not hold: {figures}."


def _open(setting: Contender, claim: Claim) -> bool:
    """Whether the intervals leave room for what was claimed; without a claim, for a gain that would have mattered."""
    pairs = _pairs(setting, claim)
    if not pairs:
        return any(too_noisy(now) is not None for now in setting.comparisons)
    return any(now.high >= max(then.least, 0.0) for now, then in pairs if not now.worse)


def _changed(setting: Contender, claim: Claim) -> str:
    """That a gain is beyond doubt another one now."""
    pairs = [(now, then) for now, then in _pairs(setting, claim) if then.low is not None and then.high is not None]
    if any(now.high < (then.low or 0.0) for now, then in pairs):
        return " The gain is smaller than it was."
    if any(now.low > (then.high or 0.0) for now, then in pairs):
        return " The gain is larger than it was."
    return ""


def _pairs(setting: Contender, claim: Claim) -> list[tuple[Comparison, Gain]]:
    """Each objective's gain now and then, where the two are on one scale."""
    both = zip(setting.comparisons, claim.gains, strict=False)
    return [(now, then) for now, then in both if (now.scale != "difference") == then.shared]
