"""Runs by their place, a folder or a store: for whoever starts, resumes or reads one.

A run in a store is read from a copy on this machine, which is brought up to date whenever it is opened: only what has
changed is fetched.
"""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from raytune_autotuner.report.mirror import Mirror
from raytune_autotuner.report.results import SUGGESTION, TRIALS, ResultsFolder, order_runs
from raytune_autotuner.report.store import Entry, Store, reason
from raytune_autotuner.report.writing import atomically
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.study import Study

_AT_ONCE = 8
FRESH_S = 5.0
"""So old a copy may be that is being followed."""
_FACTS = (".yaml", ".json", ".jsonl")
"""Endings of the files that tell what was run and what came of it; the others of a run's own weigh far more."""


def create_run(place: Path | Store, study: Study, ending: str = "") -> ResultsFolder:
    """A new run's folder: there, or on this machine where a `Mirror` is to bring it there."""
    if isinstance(place, Path):
        return ResultsFolder.create(place.absolute(), study, ending)
    with _readable(place):
        taken = place.folders()
    folder = ResultsFolder.create(kept_in(place), study, ending, taken)
    return replace(folder, store=place / folder.path.name)


def mirrored(run: ResultsFolder, say: Callable[[str], None]) -> AbstractContextManager[Mirror | None]:
    """What brings a run to the store in which it belongs, until it is left; for one that belongs here nothing."""
    return nullcontext() if run.store is None else Mirror(run.path, run.store, say)


def open_run(place: Path | Store, trials: str = "*") -> ResultsFolder:
    """The run there; of a store a copy of it, in which of all trials' folders only those named `trials` are fresh.

    Raises `ConfigError` where there is none, or where it cannot be read.
    """
    if isinstance(place, Path):
        return ResultsFolder.open(place)
    folder = _copy_of(place)
    with _readable(place):
        if folder.study_file.name in place.files(recursive=False):
            fetch(place, folder.path, trials, growing=True)
            return folder
        runs = order_runs(place.folders())
    hint = f" Did you mean {place / runs[-1]}?" if runs else " Name the folder that a study's run printed."
    raise ConfigError(f"{place}: not a results folder: it has no study.yaml.{hint}")


def runs_at(place: Path | Store, study: str | None = None) -> list[ResultsFolder]:
    """The runs there (of one study, if named), oldest first; of a store what tells of them and of their trials."""
    if isinstance(place, Path):
        return ResultsFolder.runs(place, study)
    with _readable(place):
        found = [_copy_of(place / name) for name in order_runs(place.folders(), study)]
    for run in found:
        fetch(place / run.path.name, run.path, trials="", growing=True, endings=_FACTS)
    return [run for run in found if run.study_file.is_file()]


def folders_of(trial: int | None) -> str:
    """The name of a trial's folder as far as its number tells it; of no trial, none."""
    return "" if trial is None else f"{trial}-*"


def keep_fresh(folder: ResultsFolder, trials: str) -> Callable[[], None]:
    """What brings a run's copy up to date, for whoever asks often; nothing for a run that lies here."""
    fresh_at = time.monotonic()

    def refresh() -> None:
        nonlocal fresh_at
        if folder.store is not None and time.monotonic() - fresh_at >= FRESH_S:
            with suppress(ConfigError):  # another time
                fetch(folder.store, folder.path, trials, growing=True)
            fresh_at = time.monotonic()

    return refresh


def bring_back(folder: ResultsFolder, path: Path) -> str:
    """Where people find a file that was made in the run's folder: of a run in a store, it is put there too."""
    if folder.store is None:
        return str(path)
    try:
        folder.store.write(path.name, path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{folder.store}: cannot be written, but {path} is there: {reason(error)}") from error
    return f"{folder.store / path.name}\n{path}"


def kept_in(store: Store) -> Path:
    """Where runs that belong in the store are written on this machine; they stay there."""
    return _home("XDG_STATE_HOME", ".local/state") / "results" / store.local


def fetch(
    store: Store, into: Path, trials: str = "*", *, growing: bool = False, endings: tuple[str, ...] = ("",)
) -> None:
    """Make the files in `into` those of the run in the store, as far as they differ; of its own those with `endings`.

    Of trials whose folders are not named `trials`, only those that have not ended are fetched, as they were suggested.
    `growing`: `into` is only ever written by this, so that a log that is longer there is one that has grown. Raises
    `ConfigError` where it cannot.
    """
    with _readable(store), ThreadPoolExecutor(_AT_ONCE) as pool:

        def get(files: Mapping[str, Entry]) -> None:
            list(pool.map(lambda name: _fetch_file(store, name, files[name], into / name, growing), files))

        # The status first: what it speaks of was there before it.
        get({name: entry for name, entry in store.files(recursive=False).items() if name.endswith(endings)})
        get(store.files(TRIALS) if trials == "*" else _some_of(store, trials, ResultsFolder(into)))


def _copy_of(run: Store) -> ResultsFolder:
    return ResultsFolder(_home("XDG_CACHE_HOME", ".cache") / "results" / run.local, run)


def _some_of(store: Store, trials: str, copy: ResultsFolder) -> dict[str, Entry]:
    ended = {row.number for row in copy.read_ended()}
    found: dict[str, Entry] = {}
    for folder in store.folders(TRIALS):
        number = folder.partition("-")[0]
        if fnmatch.fnmatch(folder, trials):
            found |= store.files(f"{TRIALS}/{folder}")
        elif number.isdecimal() and int(number) not in ended:
            files = store.files(f"{TRIALS}/{folder}", recursive=False)
            found |= {name: entry for name, entry in files.items() if name.endswith(f"/{SUGGESTION}")}
    return found


def _fetch_file(store: Store, name: str, there: Entry, path: Path, growing: bool) -> None:
    here = path.stat() if path.exists() else None
    if here is not None and (here.st_size, here.st_mtime_ns) == (there.size, there.mtime_ns):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if growing and _only_grows(name) and here is not None and here.st_size <= there.size:
        with path.open("r+b") as file:  # in place, for whoever follows it; another process may do the same now
            file.seek(here.st_size)
            file.write(store.read(name, here.st_size))
    else:
        with atomically(path) as part:
            part.write_bytes(store.read(name))
    os.utime(path, ns=(there.mtime_ns, there.mtime_ns))


def _only_grows(name: str) -> bool:
    return name.endswith(".log") and ".tail" not in name


@contextmanager
def _readable(store: Store) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{store}: cannot be read: {reason(error)}") from error


def _home(variable: str, usual: str) -> Path:
    """The package's folder under an XDG base folder, by whose specification relative ones are ignored."""
    configured = Path(os.environ.get(variable, ""))
    return (configured if configured.is_absolute() else Path.home() / usual) / "raytune_autotuner"
