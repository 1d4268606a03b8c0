"""What can go wrong, as a tree.

AutotunerError
├── ConfigError     the study file, the command line or the machine is not fit: nothing was started (exit code 2)
├── StudyError      the study cannot go on: ends with what was measured (exit code 1)
└── TrialFailed     one trial failed; carries its `Failure` to the trial boundary
"""

from __future__ import annotations

from typing import Any

from raytune_autotuner.study.failure import Failure

OK, NO_RESULT, WRONG_USE, INTERRUPTED = 0, 1, 2, 130
"""How a command ends, as exit codes; `cli/manual.py` says what they mean."""
_SHOWN_CHARACTERS = 100


class AutotunerError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(AutotunerError):
    """Wrong use: names the place, the value and what would be right, in one to three lines that are safe to print."""

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(printable, message.split("\n"))))


class StudyError(AutotunerError):
    """The study as a whole cannot go on."""


class TrialFailed(AutotunerError):
    """A trial failed; `failure` says at which stage, of what kind, and whose fault it is."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure

    def __reduce__(self) -> tuple[type[TrialFailed], tuple[Failure]]:
        return (TrialFailed, (self.failure,))


def printable(text: str) -> str:
    r"""`text` on one line, with what a terminal would obey or not show written out.

    >>> printable("two\nlines")
    'two\\nlines'
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: Any) -> str:
    """A wrong value as a message shows it: on one line, and cut where it is long.

    >>> shown("word"), shown("x" * 1000)[-4:]
    ("'word'", 'xxx…')
    """
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = "a very large number"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
