"""What the terminal shows of a study: a live table on a terminal, a line an event elsewhere; at the end the answer.

`make_watcher` picks the `Watcher` that fits where standard output goes. Nothing here is measured or decided.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from raytune_autotuner.report.events import Events
from raytune_autotuner.report.progress import progress, time_left_text, times_left_s
from raytune_autotuner.report.recheck import Recheck
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.status import LiveTrial
from raytune_autotuner.report.store import Store
from raytune_autotuner.report.summary import Summary, failure_lines, summarize
from raytune_autotuner.report.table import trial_table
from raytune_autotuner.report.verdict import Verdict, best_so_far
from raytune_autotuner.report.wording import contender_cells, format_duration, format_number
from raytune_autotuner.score.pareto import scores_of
from raytune_autotuner.study.masking import mask_line
from raytune_autotuner.study.space import Params, changes, readable
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import TrialRow

__all__ = ["Ending", "EventLines", "LiveTable", "LiveTrial", "StudyInfo", "Watcher", "make_watcher", "print_ending"]
_REFRESHES_PER_S = 1.0
"""For the clocks; what is new is drawn at once."""
_FOLLOW_S = 1.0
_TEXTS = 2
"""How many columns of the table of finalists are text; the others are numbers."""


@dataclass(frozen=True, slots=True)
class StudyInfo:
    """What is known when a study starts."""

    study: Study
    folder: Path
    concurrency: int = 1
    """Trials at once."""
    dashboard_url: str | None = None
    login_hint: str | None = None
    """How to log in to the dashboard; never the token itself."""
    notes: tuple[str, ...] = ()
    """Further lines: engine and its version, machine, warnings."""
    defaults: Params = field(default_factory=dict)
    """The engine's own values for parameters of the space, as far as it tells."""
    verifies: bool = False
    """Whether nothing is searched: an earlier run's winner and baseline are measured again."""
    elapsed_s: float = 0.0
    """For how long the study has run already."""
    store: Store | None = None
    """Where the folder is brought to."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a study ended."""

    verdict: Verdict
    rows: Sequence[TrialRow]
    launch: tuple[str, str] | None = None
    """The winner's launch line for this machine, and its plain form; None where there is no winner."""
    interrupted: bool = False
    reason: str | None = None
    """Why the search ended before its trials were used up."""


class Watcher(Protocol):
    """Shows a running study. `started` once, `update` about twice a second, `finished` once; `close` in any case."""

    def started(self, info: StudyInfo) -> None:
        """The study starts."""

    def update(self, rows: Sequence[TrialRow], live: Mapping[int, LiveTrial]) -> None:
        """All trials as they are now; `live` by trial number."""

    def finished(self, ending: Ending) -> None:
        """The study has ended, however it did."""

    def close(self) -> None:
        """Leave the terminal as it was; harmless after `finished`, needed after an error."""


def make_watcher(verbose: bool = False, stream: TextIO | None = None) -> Watcher:
    """A live table where `stream` (standard output) is a terminal, else a line an event."""
    stream = stream or sys.stdout
    console = make_console(stream)
    if stream.isatty() and not console.is_dumb_terminal:
        return LiveTable(console, verbose)
    return EventLines(stream, verbose)


def make_console(stream: TextIO) -> Console:
    """A console that writes colours and control codes to a terminal only, whatever the environment claims."""
    return Console(file=stream, force_terminal=stream.isatty(), highlight=False, emoji=False, markup=False)


class EventLines:
    """One line an event, written at once, without control codes."""

    def __init__(self, stream: TextIO | None = None, verbose: bool = False) -> None:
        self._stream = stream or sys.stdout
        self._verbose = verbose
        self._info: StudyInfo | None = None
        self._events: Events | None = None

    def started(self, info: StudyInfo) -> None:
        self._info = info
        self._events = Events(info.study, self._verbose)
        for line in opening_lines(info):
            self._print(line)

    def update(self, rows: Sequence[TrialRow], live: Mapping[int, LiveTrial]) -> None:
        for event in self._events.since(rows, live) if self._events else ():
            self._print(str(event))

    def finished(self, ending: Ending) -> None:
        self.update(ending.rows, {})
        if self._info is not None:
            print_ending(make_console(self._stream), self._info, ending)
            self._stream.flush()

    def close(self) -> None:
        self._stream.flush()

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class LiveTable:
    """A table of the trials that is drawn anew in place, with the clock running."""

    def __init__(self, console: Console | None = None, verbose: bool = False) -> None:
        self._console = console or make_console(sys.stdout)
        self._verbose = verbose
        self._info: StudyInfo | None = None
        self._events: Events | None = None
        self._begun = time.monotonic()
        self._updated = self._begun
        self._rows: Sequence[TrialRow] = ()
        self._live: Mapping[int, LiveTrial] = {}
        self._screen: Live | None = None
        self._latest = ""
        self._best: TrialRow | None = None

    def started(self, info: StudyInfo) -> None:
        self._info = info
        self._events = Events(info.study, self._verbose)
        self._updated = time.monotonic()
        self._begun = self._updated - info.elapsed_s
        for line in opening_lines(info):
            self._console.print(Text(line), soft_wrap=True)
        self._screen = Live(
            console=self._console,
            get_renderable=self.render,
            refresh_per_second=_REFRESHES_PER_S,
            transient=True,
            vertical_overflow="crop",
        )
        self._screen.start()

    def update(self, rows: Sequence[TrialRow], live: Mapping[int, LiveTrial]) -> None:
        self._rows, self._live, self._updated = list(rows), dict(live), time.monotonic()
        self._best = None if self._info is None else best_so_far(rows, self._info.study.objective.direction)
        for event in self._events.since(rows, live) if self._events else ():
            self._latest = str(event)
            if self._verbose:
                self._console.print(Text(str(event), style="dim"), soft_wrap=True)
        if self._screen is not None:
            self._screen.refresh()

    def finished(self, ending: Ending) -> None:
        self.update(ending.rows, {})
        self.close()
        if self._info is None:
            return
        searched = [row for row in ending.rows if row.verifies is None or self._info.verifies]
        self._console.print(
            trial_table(self._info.study, searched, {}, self._console.width, None, _number(ending.verdict.winner))
        )
        print_ending(self._console, self._info, ending)

    def close(self) -> None:
        screen, self._screen = self._screen, None
        if screen is not None:
            screen.stop()

    def render(self) -> RenderableType:
        """The table and the line below it, as of now."""
        if self._info is None:
            return Text("")
        study, width = self._info.study, self._console.width
        late = time.monotonic() - self._updated
        live = {number: _aged(trial, late) for number, trial in self._live.items()}
        foot = self._foot(live, self._best)
        room = max(self._console.height - 1 - len(foot), 5)
        return Group(trial_table(study, self._rows, live, width, room, _number(self._best)), *foot)

    def _foot(self, live: Mapping[int, LiveTrial], best: TrialRow | None) -> list[Text]:
        assert self._info is not None
        study, elapsed = self._info.study, time.monotonic() - self._begun
        ending = time_left_text(times_left_s(study, self._rows, live, self._info.concurrency, elapsed))
        parts = [progress(study, self._rows), f"{format_duration(elapsed)} elapsed", ending]
        lines = [Text(" · ".join(parts), no_wrap=True, overflow="ellipsis")]
        if best is not None:
            lines.append(Text(best_line(study, best), style="green", no_wrap=True, overflow="ellipsis"))
        if self._latest:
            lines.append(Text(self._latest, style="dim", no_wrap=True, overflow="ellipsis"))
        return lines


def follow(folder: ResultsFolder, watcher: Watcher, refresh: Callable[[], None] = lambda: None) -> None:
    """Show a study that another process runs, until it ends or is killed; returns at once where it does not run.

    `refresh` brings the folder up to date, where it is a copy.
    """
    found = summarize(folder)
    if found.status is None or not _runs(found):
        return
    elapsed_s = time.time() - found.status.started_at
    watcher.started(StudyInfo(found.study, folder.path, found.status.concurrency, elapsed_s=elapsed_s))
    try:
        while _runs(found):
            watcher.update(found.rows, found.live)
            time.sleep(_FOLLOW_S)
            refresh()
            found = summarize(folder)
        watcher.update(found.rows, {})
    finally:
        watcher.close()


def _runs(found: Summary) -> bool:
    return found.standing == "running"


def opening_lines(info: StudyInfo) -> list[str]:
    """What is said before the first trial."""
    study, objective = info.study, info.study.objective
    promises = [f"{m}_{s} <= {limit:g}" for m, limits in objective.slo.items() for s, limit in limits.items()]
    wanted = ", ".join(f"{direction} {metric}" for metric, direction in objective.targets)
    wanted += f" with {', '.join(promises)}" if promises else ""
    lines = [
        f"study {study.study}: {study.model} on {study.engine.kind}",
        f"{wanted}; {_plan(info)}",
        *info.notes,
        f"results: {info.folder}",
    ]
    if info.dashboard_url:
        lines.append(f"Ray dashboard: {info.dashboard_url}")
    return [*lines, *([info.login_hint] if info.login_hint else [])]


def _plan(info: StudyInfo) -> str:
    study, limit = info.study, f"{info.concurrency} at once, {info.study.trial.timeout_s:g} s each at most"
    if info.verifies:
        return f"{study.verify.restarts} starts of each of the two settings, {limit}"
    again = f"; the best {study.verify.top} again, {study.verify.restarts} times" if study.verify.top else ""
    return f"{study.search.trials} trials, {limit}{again}"


def best_line(study: Study, best: TrialRow) -> str:
    """`best so far: trial 3, output_throughput_tok_s 126.4 (x1.43 of baseline)`."""
    who = f"trial {best.number}" + (f" ({best.name})" if best.name else "")
    relative = f" (x{best.relative:.2f} of baseline)" if best.relative is not None and not best.name else ""
    values = zip(study.objective.targets, scores_of(best), strict=False)
    text = ", ".join(f"{metric} {format_number(score)}" for (metric, _), score in values)
    return f"best so far: {who}, {text}{relative}"


def print_ending(console: Console, info: StudyInfo, ending: Ending) -> None:
    """The answer: verdict, changes, launch lines, failures with remedies, where everything is, what to do next."""
    next_steps = [("next", "bold"), *((line, "") for line in _next_steps(info, ending))]
    sections = [
        _how_it_ended(ending),
        [(line, "") for line in comparison_lines(ending.verdict, console.width)],
        _changed(info, ending.verdict),
        _failures(ending.rows),
        next_steps,
    ]
    console.print()
    for section in sections:
        # On a terminal sentences break between words; what is to be pasted stays a line.
        whole = section is next_steps or not console.is_terminal
        for line, style in section:
            console.print(Text(line, style=style), soft_wrap=whole)
        if section:
            console.print()
    _print_launch(console, ending)


def _how_it_ended(ending: Ending) -> list[tuple[str, str]]:
    lines = []
    if ending.interrupted:
        lines.append(("Interrupted: the engines are stopped; what was measured is kept.", "yellow"))
    if ending.reason:
        lines.append((f"Ended early: {ending.reason}", "yellow"))
    lines.append((ending.verdict.sentence, "bold green" if _is_good(ending.verdict) else "bold yellow"))
    if isinstance(ending.verdict, Recheck):
        lines += [(f"  different: {one}", "") for one in ending.verdict.different]
    return [*lines, *([(ending.verdict.warning, "yellow")] if ending.verdict.warning else [])]


def _is_good(answer: Verdict) -> bool:
    """Whether there is a setting to run that keeps every SLO; of a claim, whether it holds."""
    if isinstance(answer, Recheck):
        return answer.holds is True
    winner, chosen = answer.winner, answer.chosen
    return winner is not None and (winner.feasible if chosen is None else chosen.holds)


def comparison_lines(answer: Verdict, width: int) -> list[str]:
    """What was measured again, as a small table at most `width` wide: columns are left out where there is no room."""
    if not answer.contenders:
        return []
    cells = contender_cells(answer.contenders, answer.targets)
    hidden = set() if len(answer.targets) > 1 else {"metric"}
    for name in ("", "spread", "gain", "metric"):
        hidden.add(name)
        shown = [i for i, head in enumerate(cells[0]) if head not in hidden]
        widths = {i: max(len(row[i]) for row in cells) for i in shown}
        if sum(widths.values()) + 2 * len(shown) <= width:
            break
    lines = ["  ".join(_padded(row[i], widths[i], left=i < _TEXTS) for i in shown).rstrip() for row in cells]
    return [f"measured again: {answer.targets[0][0]}" if "metric" in hidden else "measured again", *lines]


def _padded(text: str, width: int, left: bool) -> str:
    return text.ljust(width) if left else text.rjust(width)


def _changed(info: StudyInfo, verdict: Verdict) -> list[tuple[str, str]]:
    if verdict.winner is None or verdict.keeps_defaults:
        return []
    changed = changes(verdict.winner.params, {**info.defaults, **info.study.fixed})
    width = max(map(len, changed), default=0)
    head = f"changed against the baseline (trial {verdict.winner.number})"
    return [(head, "bold"), *((f"  {_change(info, name, value, width)}", "") for name, value in changed.items())]


def _change(info: StudyInfo, name: str, value: object, width: int) -> str:
    if name in info.study.fixed:
        was = f"was {readable(info.study.fixed[name])}"
    elif name in info.defaults:
        was = f"was {readable(info.defaults[name])}, the engine's default"
    else:
        was = "was the engine's default"
    return f"{name:<{width}}  {readable(value)}  ({was})"


def _failures(rows: Sequence[TrialRow]) -> list[tuple[str, str]]:
    lines = failure_lines(rows)
    return [("failures", "bold"), *((f"  {line}", "") for line in lines)] if lines else []


def _next_steps(info: StudyInfo, ending: Ending) -> list[str]:
    folder, place = _shell_path(info.folder), shlex.quote(str(info.store or info.folder))
    first = next((row.number for row in ending.rows if row.taken_from is None), 0)
    return [
        f"  results       {info.folder}",
        *([f"  for everyone  {info.store}"] if info.store else []),
        f"  report        {_shell_path(info.folder / 'report.html')}",
        f"  one trial     python -m raytune_autotuner logs {place} {first} --engine",
        f"  TensorBoard   tensorboard --logdir {folder}",
        f"  search table  optuna-dashboard {_shell_path(info.folder / 'optuna.log')}",
    ]


def _print_launch(console: Console, ending: Ending) -> None:
    """The lines to paste: last, alone, never wrapped, without colour or indentation."""
    if ending.launch is None:
        return
    here, plain = (mask_line(line) for line in ending.launch)
    console.print(Text("serve it here:", style="bold"))
    console.print(Text(here), soft_wrap=True)
    if plain != here:
        console.print(Text("the plain form, for elsewhere:", style="bold"))
        console.print(Text(plain), soft_wrap=True)


def _aged(trial: LiveTrial, seconds: float) -> LiveTrial:
    """The trial with its clock moved on since it was last heard of."""
    return LiveTrial(
        trial.number, trial.stage, trial.share, trial.elapsed_s + seconds, trial.timeout_s, trial.metrics_now
    )


def _number(row: TrialRow | None) -> int | None:
    return None if row is None else row.number


def _shell_path(path: Path) -> str:
    return shlex.quote(str(path))
