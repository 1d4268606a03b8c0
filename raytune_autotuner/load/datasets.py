"""Traffic that was written down: datasets of prompts and traces of arrivals, files of JSON lines.

In: a path of the study's `workload` section. Out: its lines as values, every one of them checked: what is wrong with a
file is a `ConfigError` that names file, line, key and value. It draws nothing, and sends nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeGuard

from raytune_autotuner.study.errors import ConfigError, shown

MAX_TOKENS = 9_999_999
MAX_TOKEN_ID = 2**31 - 1
_MAX_TIMESTAMP_MS = 1e13  # since the epoch, until the year 2286
_OUTPUT_KEYS = ("output_tokens", "output_len", "max_tokens")


@dataclass(frozen=True, slots=True)
class Sample:
    """A line of a dataset: what is asked, as text or token ids, and how long the answer is to be."""

    prompt: str | list[int]
    tokens_out: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """A line of a trace: when a request came, in seconds after the first one, and its token counts."""

    due_s: float
    tokens_in: int
    tokens_out: int


@lru_cache(maxsize=2)
def read_dataset(path: Path) -> tuple[Sample, ...]:
    """All lines of a dataset; raises `ConfigError`. Read once by a process."""
    return tuple(
        Sample(line.prompt(), line.tokens(line.only(_OUTPUT_KEYS))) for line in _lines("workload.dataset", path)
    )


@lru_cache(maxsize=2)
def read_trace(path: Path, count: int) -> tuple[Arrival, ...]:
    """The first `count` arrivals of a trace, or all where it has fewer; raises `ConfigError`. Read once by a process.

    The form is that of the published Mooncake traces: `timestamp` in ms, `input_length`, `output_length`.
    """
    lines = list(islice(_lines("workload.trace", path), count))
    for earlier, later in pairwise(lines):
        if later.milliseconds() < earlier.milliseconds():
            raise later.wrong("timestamp", f"not below the line before it ({earlier.milliseconds():g})")
    return tuple(
        Arrival(
            (line.milliseconds() - lines[0].milliseconds()) / 1e3,
            line.tokens("input_length"),
            line.tokens("output_length"),
        )
        for line in lines
    )


@dataclass(frozen=True, slots=True)
class _Line:
    """One line's values, and where it stands."""

    where: str
    values: Mapping[str, Any]

    def wrong(self, key: str, right: str) -> ConfigError:
        """The error for a value that is not `right`."""
        if key not in self.values:
            return ConfigError(f"{self.where}: {key}: is missing; the line has {self._keys()}.")
        return ConfigError(f"{self.where}: {key}: should be {right}, but got {shown(self.values[key])}.")

    def only(self, keys: tuple[str, ...]) -> str:
        """The one of `keys` that the line has."""
        given = [key for key in keys if key in self.values]
        if len(given) != 1:
            found = f"{' and '.join(given)} both stand there" if given else f"the line has {self._keys()}"
            raise ConfigError(f"{self.where}: exactly one of {', '.join(keys)} is needed, but {found}.")
        return given[0]

    def tokens(self, key: str) -> int:
        """A token count."""
        value = self.values.get(key)
        if not _is_whole(value) or not 1 <= value <= MAX_TOKENS:
            raise self.wrong(key, f"a whole number of tokens from 1 to {MAX_TOKENS:,}")
        return value

    def milliseconds(self) -> float:
        """The time stamp."""
        value = self.values.get("timestamp")
        if not (_is_whole(value) or isinstance(value, float)) or not 0 <= value <= _MAX_TIMESTAMP_MS:
            raise self.wrong("timestamp", f"a number of milliseconds from 0 to {_MAX_TIMESTAMP_MS:g}")
        return float(value)

    def prompt(self) -> str | list[int]:
        """The prompt: text, or token ids."""
        key = self.only(("prompt", "prompt_token_ids"))
        value = self.values[key]
        if key == "prompt" and not (isinstance(value, str) and value):
            raise self.wrong(key, "text (token ids go under prompt_token_ids)")
        if key != "prompt" and not (isinstance(value, list) and value and all(map(_is_token_id, value))):
            raise self.wrong(key, "a list of token ids")
        return value  # type: ignore[no-any-return]

    def _keys(self) -> str:
        return ", ".join(shown(key) for key in list(self.values)[:6]) or "no keys"


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token_id(value: Any) -> bool:
    return _is_whole(value) and 0 <= value <= MAX_TOKEN_ID


def _lines(key: str, path: Path) -> Iterator[_Line]:
    """The lines that are not empty; a file without any is refused."""
    empty = True
    try:
        if not path.is_file():
            problem = "is no file of JSON lines" if path.exists() else "no such file"
            raise ConfigError(f"{key}: {path}: {problem}; name a file with one JSON object a line.")
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    empty = False
                    yield _parse(f"{key}: {path}, line {number}", text)
    except OSError as error:
        raise ConfigError(f"{key}: {path}: cannot be read: {error.strerror or error}.") from error
    if empty:
        raise ConfigError(f"{key}: {path}: is empty; it takes one JSON object a line.")


def _parse(where: str, text: bytes) -> _Line:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is not JSON ({error}): {shown(text.strip().decode(errors='replace'))}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: should be a JSON object with keys, but got {shown(values)}.")
    return _Line(where, values)
