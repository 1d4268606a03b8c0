"""A run's folder on its driver's machine, brought to a store while the study runs and at its end.

A study always writes to a folder of its own machine, for what it writes wants a file system: logs that grow, Optuna's
journal, TensorBoard's files. Where its results belong in a store, a `Mirror` brings them over. A store that does not
answer costs nothing but time: what is due stays due. Knows files, not what is in them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType

from raytune_autotuner.report.store import Store, reason
from raytune_autotuner.study.errors import StudyError

ROUND_S = 10.0
"""So often what has changed is brought over, and at once what is due; see `_ease_s`."""
EASE_S = 1.0
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
"""Between two tries on a store that does not answer: doubled from the first to the longest."""
PATIENCE_S = 60.0
"""How long a study that has ended tries to bring over what is left."""
_SHARE = 10
"""A round may take one part in so many of the time."""
_AT_ONCE = 8
_LAST = ("optuna.log", "trials.jsonl", "status.json")
"""Each speaks of what is in those before it and in all other files. Whoever finds one in the store finds that there,
also where the driver died in the midst of a round: a study goes on from there."""


class Mirror:
    """Brings a run's folder to a store; as a context manager, from a study's start to its end.

    Each round brings what has changed among the folder's own files, and what `due` was told of, which begins one. The
    end brings all that has changed. Leaving raises `StudyError` where it never came.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        say: Callable[[str], None],
        *,
        round_s: float = ROUND_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`say` is told, from another thread, when the store stops answering and when it answers again."""
        self._folder = folder
        self._store = store
        self._say = say
        self._round_s = round_s
        self._patience_s = patience_s
        self._brought: dict[Path, tuple[int, int]] | None = None
        self._told: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self._due: set[Path] = set()
        self._why: str | None = None
        self._wait_s = FIRST_WAIT_S
        self._news = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def due(self, path: Path) -> None:
        """Bring this file, or all files of this folder, as soon as may be; returns at once."""
        self._told.put(path)
        self._news.set()

    def __enter__(self) -> Mirror:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ending.set()
        self._news.set()
        self._thread.join()
        until, self._wait_s = time.monotonic() + self._patience_s, FIRST_WAIT_S
        # Twice, as what `say` was told may be in a file of the folder.
        while not (self._bring(self._all) and self._bring(self._top)):
            if time.monotonic() + self._wait_s > until:
                left = f"The results never came to {self._store}: {self._why}\nThey are whole in {self._folder}."
                if kind is None:
                    raise StudyError(left)
                self._say(left)
                return
            time.sleep(self._wait_s)

    def _work(self) -> None:
        while not self._ending.is_set():
            begun = time.monotonic()
            if not self._round():
                self._ending.wait(self._wait_s)
                continue
            self._ending.wait(self._ease_s(time.monotonic() - begun))
            self._news.wait(self._round_s)

    def _ease_s(self, took_s: float) -> float:
        """Between two rounds at least: many trials that end soon after each other do not make one each."""
        return min(max(EASE_S, _SHARE * took_s), self._round_s)

    def _round(self) -> bool:
        self._news.clear()
        done = self._bring(self._due_now)
        if done:
            self._due.clear()
        return done

    def _bring(self, paths: Callable[[], Iterable[Path]]) -> bool:
        """Bring what has changed of `paths`, and then the last ones as they were before; whether all of it came."""
        try:
            in_order = [self._folder / name for name in _LAST]
            last = [_Taken.of(path) for path in reversed(in_order) if self._changed(path)]
            others = [path for path in _files_in(paths()) if path not in in_order and self._changed(path)]
            with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="mirror") as pool:
                list(pool.map(lambda path: self._send(_Taken.of(path)), others))
            for taken in reversed(last):
                self._send(taken)
        except OSError as error:
            self._failed(reason(error))
            return False
        self._worked()
        return True

    def _known(self) -> dict[Path, tuple[int, int]]:
        """What the store has of each file: at first what a resumed run was fetched with, which bears its time."""
        if self._brought is None:
            there = self._store.files()
            self._brought = {self._folder / name: (entry.size, entry.mtime_ns) for name, entry in there.items()}
        return self._brought

    def _changed(self, path: Path) -> bool:
        return self._known().get(path) != _state(path)

    def _send(self, taken: _Taken | None) -> None:
        if taken is not None and self._known().get(taken.path) != taken.state:
            self._store.write(taken.path.relative_to(self._folder).as_posix(), taken.content)
            self._known()[taken.path] = taken.state

    def _failed(self, why: str) -> None:
        if self._why is None:
            self._wait_s = FIRST_WAIT_S
            self._say(f"{self._store} does not take the results, which are kept in {self._folder} until it does: {why}")
        else:
            self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        self._why = why

    def _worked(self) -> None:
        if self._why is not None:
            self._say(f"{self._store} takes the results again, and has those that it missed")
        self._why = None

    def _due_now(self) -> Iterator[Path]:
        while not self._told.empty():
            self._due.add(self._told.get())
        return chain(self._due, self._top())

    def _all(self) -> Iterator[Path]:
        """But Ray Tune's own state beside the trials' folders, which is of no use elsewhere and not masked."""
        return chain(self._top(), (path for path in self._folder.glob("*/*") if path.is_dir()))

    def _top(self) -> Iterator[Path]:
        return (path for path in self._folder.iterdir() if path.is_file())


@dataclass(frozen=True)
class _Taken:
    """A file as it was at one time."""

    path: Path
    state: tuple[int, int]
    content: bytes

    @classmethod
    def of(cls, path: Path) -> _Taken | None:
        """The file as it is now; None where it is gone, as a log that has turned."""
        state = _state(path)  # first: what is written meanwhile is taken the next time
        try:
            return cls(path, state, path.read_bytes())
        except FileNotFoundError:
            return None


def _files_in(paths: Iterable[Path]) -> Iterator[Path]:
    """The files themselves, and all files in folders; not hidden ones, nor links, of which Optuna's lock is one."""
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file() and not file.is_symlink() and not file.name.startswith("."):
                yield file


def _state(path: Path) -> tuple[int, int]:
    """Tells a file from what it was before."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns
