"""Reading an engine's log: how far the engine got, and what stopped it.

`LogReader` follows the stages of a log as it is written, one cheap call a line. `diagnose` reads a log that has ended
(or has not) and names the failure, its one proving line and a remedy. What lines mean is data, in `rules`. Nothing
here knows processes, studies or scores; standard library only, since the supervisor of an engine imports it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import product
from typing import NamedTuple

from raytune_autotuner.engine.rules import ANY_RULES, SIMULATED_RULES, VLLM_RULES, FailureRule, LogRules, StageRule
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.masking import mask

__all__ = [
    "ANY_RULES",
    "SIMULATED_RULES",
    "VLLM_RULES",
    "Diagnosis",
    "FailureRule",
    "LogReader",
    "LogRules",
    "StageRule",
    "diagnose",
    "split_stamp",
]

EVIDENCE_LENGTH = 500
"""Characters of a proving line that are kept."""

_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z \[[a-z-]*\] ?")


def split_stamp(line: str) -> str:
    """The line as the engine wrote it, without our time and stage in front.

    >>> split_stamp("2026-11-23T00:31:22.123Z [weights] Loading weights took 0.49 seconds")
    'Loading weights took 0.49 seconds'
    """
    if line[10:11] != "T":
        return line
    stamp = _STAMP.match(line)
    return line if stamp is None else line[stamp.end() :]


class LogReader:
    """Follows the furthest stage that a log shows; it never goes back."""

    def __init__(self, rules: LogRules = VLLM_RULES) -> None:
        self.stage = Stage.ARGUMENTS
        self.share = 0.0
        """How much of `stage` is done, in [0, 1]."""
        self._shares = {stage: re.compile(pattern) for stage, pattern in rules.shares.items()}
        self._ahead = tuple((rule.mark, rule) for rule in reversed(rules.stages))

    @property
    def serving(self) -> bool:
        """Whether the engine has said that it takes requests."""
        return self.stage in (Stage.READY, Stage.WARMUP, Stage.LOAD)

    def feed(self, line: str) -> None:
        """Take the next line, with or without our stamp."""
        for mark, rule in self._ahead:
            if mark in line and not (rule.unless and rule.unless in line):
                self._reach(rule)
                break
        if "%" in line and self.stage in self._shares:
            self._progress(self._shares[self.stage], line)

    def _reach(self, rule: StageRule) -> None:
        if rule.stage is not self.stage:
            self.stage, self.share = rule.stage, 0.0
            self._ahead = tuple((mark, later) for mark, later in self._ahead if self._still_tells(later))
        self.share = max(self.share, rule.share)

    def _still_tells(self, rule: StageRule) -> bool:
        ahead = rule.stage.order - self.stage.order
        return ahead > 0 or (ahead == 0 and rule.share > 0)

    def _progress(self, pattern: re.Pattern[str], line: str) -> None:
        for found in pattern.finditer(line):
            self.share = max(self.share, min(float(found[1]) / 100.0, 1.0))


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What a log shows: the furthest stage (None: it shows nothing), and why the engine ended badly.

    `failure` is None for an engine that is starting, serving, or was stopped on purpose.
    """

    stage: Stage | None
    failure: Failure | None


def diagnose(
    lines: Iterable[str],
    *,
    exit_code: int | None = None,
    rules: LogRules = VLLM_RULES,
    ended_by_us: bool = False,
) -> Diagnosis:
    """What stopped the engine that wrote these lines.

    `exit_code` is that of the engine's first process: negative or above 128 for a signal, None where it still runs or
    nobody knows. `ended_by_us`: the end itself is no failure, only an error before it is.
    """
    story = _Story(rules)
    for line in lines:
        for part in _parts(line):
            story.read(part)
    stage = story.reader.stage if story.last or exit_code is not None else None
    return Diagnosis(stage, story.failure(exit_code, ended_by_us))


# --- lines ---

_ANSI = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?"
_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
_FOREIGN = (
    r"\A(?:[\w.-]+ +\| )?"  # docker compose
    r"(?:\[?\d{4}-\d\d-\d\d[T ][\d:.,]+(?:Z|[+-]\d\d:?\d\d)?(?: [A-Z]+\d+)*\]?"  # ISO time
    r"(?: |$)(?:std(?:out|err) [FP] )?"  # no more than one space: a line of a traceback is indented
    r"|[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \S+ [^\s:]+: )?"  # journal
)
_SOURCE = r"\((\w[\w-]*)(?: [^()]*)?pid=(\d+)[^()]*\) ?"
_RANK = r"\A\[rank\d+\]: "  # torch's, in front of each line of a traceback
_LEVEL = r"(DEBUG|INFO|WARNING|ERROR|CRITICAL)(?: \d\d-\d\d \d\d:\d\d:\d\d(?:[.,]\d+)? \[?[\w./-]+:\d+\](?: |$)|: +)"


class _Line(NamedTuple):
    source: str
    """The process's name and id; empty for a line without."""
    level: str
    text: str


def _parts(line: str) -> Iterator[str]:
    """The line without its end, cut where a progress bar wrote over itself."""
    line = line.rstrip("\r\n")
    return iter(line.split("\r")) if "\r" in line else iter((line,))


def _parse(line: str) -> _Line:
    text = re.sub(_ANSI, "", line) if "\x1b" in line else line
    text = re.sub(_FOREIGN, "", text, count=1)
    source = re.match(_SOURCE, text)
    text = re.sub(_RANK, "", text if source is None else text[source.end() :])
    level = re.match(_LEVEL, text)
    text = text if level is None else text[level.end() :]
    return _Line("" if source is None else f"{source[1]} {source[2]}", "" if level is None else level[1], text)


_TAIL = r" \[type=\w+, input_value=.*$"


def _clean(text: str) -> str:
    """A line fit to be shown: one line, no control characters, no secrets, at most `EVIDENCE_LENGTH` characters."""
    for pattern in (_ANSI, _CONTROL, _TAIL):
        text = re.sub(pattern, "", text)
    text = " ".join(mask(text).split()).strip("│ ")  # around which some command lines draw a box
    return text if len(text) <= EVIDENCE_LENGTH else text[: EVIDENCE_LENGTH - 1] + "…"


# --- errors ---

_BEGIN = "Traceback (most recent call last):"
_GROUP = f"Exception Group {_BEGIN}"
_MARGIN = r"\A +\|(?: |$)"
_RULER = r" *\+[-+]{8,}+(?P<next> \d+ -)?"
"""Between the exceptions of a group, and after the last."""
_OTHERS = r"(?:\[rank\d+\]:)?\[[IWEF]\d{4} |usage: "
"""How lines begin that are no part of a message before them: those of torch's C++ parts, of the next start."""
_GAVE_UP = r"^SystemExit: (?!0$|1[2-5]\d$)"
"""An exit because of what came before it in the chain; that of a stop on purpose has no code, 0 or a signal's."""
_LINKS = ("The above exception was the direct cause", "During handling of the above exception")
_MESSAGE_LINES = 8
_FRAMES = 200


class _Part(Enum):
    """What of an error was read last."""

    FRAMES = auto()
    MESSAGE = auto()
    GAP = auto()
    LINK = auto()


@dataclass(slots=True)
class _Error:
    """One error of a log: a chain of exceptions as a traceback shows it, or a lone line."""

    line: _Line
    at: Stage
    harmless: bool = False
    messages: list[list[str]] = field(default_factory=list)
    """The lines of each exception of the chain, the first cause first."""
    frames: deque[str] = field(default_factory=lambda: deque(maxlen=_FRAMES))
    part: _Part = _Part.FRAMES
    grouped: bool = False
    """Whether it holds a group of exceptions, drawn with a margin."""
    survived: bool = False
    """Whether the server went on after it."""

    @classmethod
    def alone(cls, line: _Line, at: Stage) -> _Error:
        """An error that is one line."""
        return cls(line, at, messages=[[line.text]], part=_Part.MESSAGE)

    def take(self, text: str) -> bool:
        """Take the next line of the same process; False where the error ended before it."""
        self.grouped = self.grouped or text.endswith(_GROUP)
        if self.grouped and (ruler := re.match(_RULER, text)):
            self.part = _Part.FRAMES if ruler["next"] else _Part.GAP
            return True
        return self._take(re.sub(_MARGIN, "", text, count=1) if self.grouped else text)

    def _take(self, text: str) -> bool:
        if self.part is _Part.FRAMES:
            return self._take_frame(text)
        if text.endswith(_BEGIN):
            linked, self.part = self.part is _Part.LINK, _Part.FRAMES
            return linked
        if not text or text.startswith(_LINKS):
            self.part = _Part.LINK if text or self.part is _Part.LINK else _Part.GAP
            return True
        return self._take_message(text)

    def _take_frame(self, text: str) -> bool:
        if text.endswith(_BEGIN):
            self.frames.clear()
        elif text[:1] in ("", " ", "|", "+"):
            self.frames.append(text.strip())
        else:
            self.messages.append([text])
            self.part = _Part.MESSAGE
        return True

    def _take_message(self, text: str) -> bool:
        if self.part is not _Part.MESSAGE or len(self.messages[-1]) >= _MESSAGE_LINES:
            return False
        if re.match(_OTHERS, text):
            return False
        self.messages[-1].append(text)
        return True

    @property
    def causes(self) -> list[list[str]]:
        """Its messages, without that of an exit that another one led to."""
        return [message for message in self.messages if not re.search(_GAVE_UP, message[0])] or self.messages

    def proofs(self) -> Iterator[str]:
        """Lines that may prove the cause, the most telling first: the last exception's, then those it came from."""
        causes = self.causes
        for message in reversed(causes):
            yield self._telling(message)
        for message in reversed(causes):
            yield from message[1:]

    def _telling(self, message: list[str]) -> str:
        if "validation error" in message[0] and len(message) > 1:
            return _complaint(*message[1:])
        if re.fullmatch(r"[\w.]+: *|[\w.]+", message[0]) and self.frames:
            return f"{message[0].rstrip(': ')}: {self._code()}"
        return message[0]

    def _code(self) -> str:
        """The source line that raised."""
        return next((frame for frame in reversed(self.frames) if frame.strip("^~ ")), "")


def _complaint(first: str, *rest: str) -> str:
    """The first complaint of a pydantic error, with its field's name where that stands on a line before it."""
    if first.startswith(" ") or not rest:
        return first.strip()
    return f"{first.strip()}: {rest[0].strip()}"


# --- the whole log ---


_NOTABLE = (
    *("rror", "raceback", "xception", "ERROR", "CRITICAL", "died", "ail", "hut", "SIG", "nterrupt", "xit", "erminat"),
    *("fault", "bind", "non-default", "not found", "named", "o such", "nvalid", "ot defined", "in use"),
)
"""What lines have that tell of an error, a stop or a fresh start; the others are skipped at little cost."""


def _is_notable(line: str) -> bool:
    for mark in _NOTABLE:  # noqa: SIM110  # a generator would take three times as long
        if mark in line:
            return True
    return False


_SERIOUS = ("", "WARNING", "ERROR", "CRITICAL")
_ORDINARY = ("DEBUG", "INFO")
_ENDS = (Kind.WORKER_LOST, Kind.ENGINE_DIED, Kind.HUNG)


class _Story:
    """What a log tells, line by line: stages, errors, marks of a fatal end and of a stop on purpose."""

    _KEPT = 64

    def __init__(self, rules: LogRules) -> None:
        self.rules = rules
        self._restart()

    def _restart(self) -> None:
        self.reader = LogReader(self.rules)
        self.errors: deque[_Error] = deque(maxlen=self._KEPT)
        self.last = self.last_error = ""
        self.fatal = self.stopping = False
        self._open: dict[str, _Error] = {}
        self._before: dict[str, str] = {}
        self._watched: list[_Error] = []

    def read(self, line: str) -> None:
        """Take the next line."""
        line = split_stamp(line)
        if line:
            self.last = line
        before = self.reader.stage
        self.reader.feed(line)
        if self.reader.stage is not before and before.order < Stage.READY.order <= self.reader.stage.order:
            self.errors.clear()  # it came up in spite of them
        advanced = self.reader.stage is not before
        if self._open or _is_notable(line) or (self._watched and (advanced or "INFO" in line or "DEBUG" in line)):
            self._note(_parse(line), advanced)

    def _note(self, line: _Line, advanced: bool) -> None:
        if not self._continues(line):
            self._mark(line)
            self._outlive(line, advanced)
            self._begin(line)
        if line.text:
            self._before[line.source] = line.text

    def _continues(self, line: _Line) -> bool:
        """Whether the line belongs to an error that is being read."""
        error = self._open.get(line.source)
        if error is None:
            return False
        if line.level == error.line.level and error.take(line.text):
            return True
        if error.part is not _Part.FRAMES or line.level == error.line.level:
            del self._open[line.source]
        return False

    def _mark(self, line: _Line) -> None:
        """Note what the line says of the server as a whole."""
        if re.search(self.rules.launch, line.text) and (self.fatal or self.stopping or self.errors):
            self._restart()
            self.last = line.text
        elif re.search(self.rules.shutdown, line.text):
            self.stopping = True
        elif line.level in _SERIOUS and not self.stopping and re.search(self.rules.fatal, line.text):
            self.fatal = True

    def _outlive(self, line: _Line, advanced: bool) -> None:
        """Note which errors their process has gone on after; of one that is not named, the start as a whole."""
        if self.stopping:
            return
        for error in self._watched:
            same = line.source == error.line.source
            went_on = (line.level in _ORDINARY and same) or (advanced and (same or not error.line.source))
            error.survived = error.part is not _Part.FRAMES and went_on
        self._watched = [error for error in self._watched if not error.survived]

    def _begin(self, line: _Line) -> None:
        """Begin an error where the line does."""
        if self.stopping or line.level not in _SERIOUS:
            return
        if line.text.endswith(_BEGIN):
            error = _Error(line, self.reader.stage, harmless=self._is_harmless(line))
            error.grouped = line.text.endswith(_GROUP)
            self._open[line.source] = error
            self._keep(error)
        elif re.search(f"{self.rules.lone}|{self.rules.fatal}", line.text):
            self._keep(_Error.alone(line, self.reader.stage))
        elif line.level in ("ERROR", "CRITICAL") and line.text:
            self.last_error = line.text

    def _keep(self, error: _Error) -> None:
        if not error.harmless:
            self.errors.append(error)
            self._watched = [*self._watched, error][-self._KEPT :]

    def _is_harmless(self, line: _Line) -> bool:
        """Whether such an error never ends the server, as one of a single request."""
        if re.search(self.rules.harmless, self._before.get(line.source, "")):
            return True
        return self.reader.serving and line.source.startswith("APIServer")

    def failure(self, exit_code: int | None, ended_by_us: bool) -> Failure | None:
        """The failure that the log and the exit code show, or None."""
        errors = [error for error in self.errors if error.messages and not self._is_stop(error)]
        if not self.fatal and (ended_by_us or _signal(exit_code) in _KILLS):
            errors = [error for error in errors if not error.survived]  # of which the end is none
        if not self._failed(errors, exit_code, ended_by_us):
            return None
        if errors:
            return self._explained(errors)
        if exit_code is not None and _signal(exit_code) is not None:
            return self._killed(exit_code)
        words = self.last_error or self.last
        return self._failure(_UNKNOWN, words or f"exit code {exit_code}, and nothing in the log")

    def _is_stop(self, error: _Error) -> bool:
        return any(re.search(self.rules.shutdown, message[0]) for message in error.causes)

    def _failed(self, errors: Sequence[_Error], exit_code: int | None, ended_by_us: bool) -> bool:
        if self.fatal or (errors and not self.reader.serving):
            return True
        if ended_by_us or exit_code in (None, 0) or _signal(exit_code) in _STOP_SIGNALS:
            return False
        return bool(errors) or not self.stopping

    def _explained(self, errors: Sequence[_Error]) -> Failure:
        """By the first error that a rule knows, else by the first that was not survived.

        Echoes count only where nothing else does, the loss of another process only where no error says why it ended.
        """
        roots = [error for error in errors if not self._is_echo(error)] or errors
        causes = (cause for cause in map(self._cause, roots) if cause is not None)
        first = next(causes, None)
        if first is None:
            return self._failure(_UNKNOWN, next(min(roots, key=lambda error: error.survived).proofs()))
        if first[0].follows:
            first = next((cause for cause in causes if cause[0].kind not in _ENDS), first)
        return self._failure(*first)

    def _cause(self, error: _Error) -> tuple[FailureRule, str, dict[str, str | None]] | None:
        """The first rule that knows the error, its proving line and the values in it."""
        for rule, proof in product(self.rules.failures, tuple(error.proofs())):
            if (found := _match(rule, proof, error)) is not None:
                return rule, proof, found.groupdict()
        return None

    def _is_echo(self, error: _Error) -> bool:
        return all(re.search(self.rules.echoes, message[0]) for message in error.causes)

    def _killed(self, exit_code: int) -> Failure:
        signal = _signal(exit_code)
        name, rule = _SIGNALS.get(signal or 0, (f"signal {signal}", _UNKNOWN))
        last = f"; last line: {_clean(_parse(self.last).text)}" if self.last else ""
        survived = any(error.survived for error in self.errors)
        errors = "it went on after the errors in the log" if survived else "no error in the log"
        proof = f"ended by {name} (exit code {exit_code}), {errors}{last}"
        return self._failure(rule, proof, {"spare": self.rules.spare})

    def _failure(self, rule: FailureRule, proof: str, values: Mapping[str, str | None] | None = None) -> Failure:
        remedy = rule.remedy.format_map({name: value or "?" for name, value in (values or {}).items()})
        return Failure(
            stage=self.reader.stage,
            kind=rule.kind,
            blame=rule.blame,
            evidence=_clean(_parse(proof).text),
            remedy=_clean(remedy),
            share=self.reader.share,
            depends=rule.depends,
        )


def _match(rule: FailureRule, proof: str, error: _Error) -> re.Match[str] | None:
    """What the rule finds in the proving line, or None where it does not hold."""
    if rule.only_at and error.at not in rule.only_at:
        return None
    if rule.within and not any(rule.within in frame for frame in error.frames):
        return None
    found = re.search(rule.pattern, proof)
    return found if found is None or rule.holds is None or rule.holds(found) else None


_STOP_SIGNALS = (1, 2, 15)
_KILLS = (*_STOP_SIGNALS, 9)
"""Signals that come from others; the rest a process brings on itself, as by an error before it."""


def _signal(exit_code: int | None) -> int | None:
    """The signal that an exit code tells of, in Python's way (-9) or a shell's (137)."""
    if exit_code is None:
        return None
    if exit_code < 0:
        return -exit_code
    return exit_code - 128 if 128 < exit_code < 160 else None


_UNKNOWN = FailureRule(
    Kind.UNKNOWN,
    Blame.PARAMETERS,
    "",
    "Not a failure that is known here: read the engine's log around this line.",
)
_CRASH = FailureRule(
    Kind.ENGINE_DIED,
    Blame.PARAMETERS,
    "",
    "The engine crashed under this setting: leave it out, or report it to the engine's makers.",
)
_SIGNALS = {
    4: (
        "SIGILL",
        FailureRule(
            Kind.UNSUPPORTED,
            Blame.PARAMETERS,
            "",
            "The engine's build uses instructions that this CPU lacks: install one built for it.",
        ),
    ),
    6: ("SIGABRT", _CRASH),
    7: (
        "SIGBUS",
        FailureRule(
            Kind.OUT_OF_MEMORY,
            Blame.ENVIRONMENT,
            "",
            "Most often shared memory (/dev/shm) is full: enlarge it or remove what was left there.",
        ),
    ),
    8: ("SIGFPE", _CRASH),
    9: (
        "SIGKILL",
        FailureRule(
            Kind.OUT_OF_MEMORY,
            Blame.PARAMETERS,
            "",
            "Most often the kernel, for memory: {spare}, and look at dmesg.",
        ),
    ),
    11: ("SIGSEGV", _CRASH),
}
