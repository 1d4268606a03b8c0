"""Trials' files, brought to the study's folder from the nodes on which they run.

A trial writes straight into its folder, by its path, on its own node. Where that is a shared path nothing is to be
brought. Elsewhere a small actor on that node reads what is new: every few seconds while trials run, so that their logs
can be followed and a node that is lost takes no more than seconds of them along; and at a trial's end, also when its
actor was killed: it is the supervisor that ends the log, and it outlives the actor.

What is new is told from the files here, by their sizes and their ends: nothing is kept in mind that a restart could
lose, and a log that has turned is renamed here as it was there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_autotuner.engine.server import all_ended
from raytune_autotuner.report.results import SUGGESTION
from raytune_autotuner.report.store import is_inside
from raytune_autotuner.report.writing import atomically

logger = logging.getLogger(__name__)

SETTLED_S = 5.0
"""So long the supervisor of a killed trial may take to end its processes and the log."""
BRING_S = 60.0
EVERY_S = 5.0
"""So often a node is asked what its trials have written."""
AT_ONCE_BYTES = 4 * 1024**2
"""So much it answers at most while they run; the rest comes with the next answers."""
POLL_S = 0.05
_END_BYTES = 4096


@dataclass(frozen=True)
class Known:
    """A file as far as it is here."""

    size: int
    end: bytes
    """A digest of its last bytes."""


@dataclass(frozen=True)
class Piece:
    """What is new in one file of a trial's folder."""

    name: str
    was: str | None
    """The name under which its beginning is here; None where it is to be written anew."""
    offset: int
    packed: bytes


class FarFiles:
    """What trials on other nodes write, kept up to date here."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._near = {"", ray.get_runtime_context().get_node_id()}
        self._readers: dict[str, Any] = {}
        self._asked: dict[str, Any] = {}
        self._asked_at: dict[str, float] = {}

    def refresh(self, running: Mapping[str, Sequence[Path]]) -> None:
        """Take what has come of running trials, by node, and ask for what is new; returns at once."""
        for node_id in running.keys() - self._near:
            if node_id in self._asked:
                self._take(node_id, wait_s=0)
            if node_id not in self._asked and time.monotonic() - self._asked_at.get(node_id, 0.0) >= EVERY_S:
                self._ask(node_id, running[node_id], AT_ONCE_BYTES)

    def bring(self, trial_dir: Path, node_id: str) -> None:
        """All that a trial has left on its node, once nothing writes there any more; waits for it."""
        why = self._take(node_id, BRING_S) if node_id in self._asked else None
        if node_id not in self._asked and node_id not in self._near:
            self._ask(node_id, [trial_dir], None)
            why = self._take(node_id, BRING_S)
        if why is not None:
            logger.warning("%s: what it wrote last stays on node %s: %s", trial_dir, node_id, why)

    def _ask(self, node_id: str, trial_dirs: Sequence[Path], limit: int | None) -> None:
        if node_id not in self._readers:
            there = NodeAffinitySchedulingStrategy(node_id, soft=False)
            reader = ray.remote(FileReader).options(num_cpus=0, scheduling_strategy=there)
            self._readers[node_id] = reader.remote(self._run_id)
        known = {trial_dir: known_files(trial_dir) for trial_dir in trial_dirs}
        self._asked[node_id] = self._readers[node_id].read.remote(known, limit)
        self._asked_at[node_id] = time.monotonic()

    def _take(self, node_id: str, wait_s: float) -> str | None:
        """Write down a node's answer, if it has come; why it has not, for people."""
        try:
            found: dict[Path, list[Piece]] | None = ray.get(self._asked[node_id], timeout=wait_s)
        except ray.exceptions.GetTimeoutError:
            return "it does not answer"
        except ray.exceptions.RayError as error:
            del self._asked[node_id], self._readers[node_id]
            return type(error).__name__
        del self._asked[node_id]
        if found is None:  # it shares the study's path
            self._near.add(node_id)
            ray.kill(self._readers.pop(node_id))
            return None
        for trial_dir, pieces in found.items():
            write_pieces(trial_dir, pieces)
        return None


class FileReader:
    """Reads trials' folders on its node."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    def __repr__(self) -> str:
        """As the Ray dashboard shows the actor."""
        return f"{self._run_id} files on {socket.gethostname()}"

    def read(self, known: Mapping[Path, Mapping[str, Known]], limit: int | None) -> dict[Path, list[Piece]] | None:
        """What is new in them, without `limit` once their engines have ended; None where the path is shared."""
        # The driver has put it there before the trial began: on another node it is missing, unless the path is shared.
        if any((trial_dir / SUGGESTION).exists() for trial_dir in known):
            return None
        if limit is None:
            _settle(known)
        room = Room(limit)
        return {trial_dir: list(new_pieces(trial_dir, files, room)) for trial_dir, files in known.items()}


@dataclass
class Room:
    """How many bytes an answer may still hold; None for any number."""

    left: int | None = None

    def take(self, size: int, whole: bool) -> int | None:
        """Up to `size` bytes of it; None where there is none left, or too little for what must come `whole`."""
        if self.left is None:
            return size
        if size and (not self.left or (whole and size > self.left)):
            return None
        taken = min(size, self.left)
        self.left -= taken
        return taken


def new_pieces(trial_dir: Path, known: Mapping[str, Known], room: Room) -> Iterator[Piece]:
    """What `trial_dir` has beyond what is `known`, as far as there is room for it."""
    files = {path.relative_to(trial_dir).as_posix(): path for path in _files(trial_dir)}
    grown = {name for name in files.keys() & known.keys() if _continues(files[name], known[name])}
    turned = {name: one for name, one in known.items() if name not in grown and one.size}
    for name, path in files.items():
        was = name if name in grown else _name_before(path, turned)
        offset = known[was].size if was else 0
        content = _read_on(path, offset, room)
        if content is not None and (content or was != name):
            yield Piece(name, was, offset, zlib.compress(content, 1))


def write_pieces(trial_dir: Path, pieces: Iterable[Piece]) -> None:
    """Put what is new into `trial_dir`."""
    sound = [piece for piece in pieces if is_inside(piece.name) and is_inside(piece.was or "")]
    for piece in sound:
        if piece.was not in (None, piece.name):
            (trial_dir / str(piece.was)).replace(trial_dir / piece.name)
    for piece in sound:
        path = trial_dir / piece.name
        content = zlib.decompress(piece.packed)
        if piece.was is not None:
            with path.open("r+b") as file:
                file.seek(piece.offset)
                file.write(content)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomically(path) as part:
                part.write_bytes(content)


def known_files(trial_dir: Path) -> dict[str, Known]:
    """The files of a trial's folder as far as they are there."""
    known = {}
    for path in _files(trial_dir):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            known[path.relative_to(trial_dir).as_posix()] = Known(size, _end(file, size))
    return known


def _name_before(path: Path, turned: Mapping[str, Known]) -> str | None:
    """The name that a log had before it turned; other files may begin alike by chance."""
    logs = (name for name in turned if _is_log(name) and _is_log(path.name))
    return next((name for name in logs if _continues(path, turned[name])), None)


def _is_log(name: str) -> bool:
    return name.endswith(".log")


def _files(trial_dir: Path) -> list[Path]:
    found = (path for path in sorted(trial_dir.rglob("*")) if not path.name.startswith("."))
    return [path for path in found if path.is_file()]


def _continues(path: Path, known: Known) -> bool:
    """Whether a file begins with what is known, by the size and the end of that."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        return file.seek(0, os.SEEK_END) >= known.size and _end(file, known.size) == known.end
    return False


def _end(file: BinaryIO, size: int) -> bytes:
    """A digest of the last bytes before `size`."""
    file.seek(max(size - _END_BYTES, 0))
    return hashlib.sha256(file.read(min(size, _END_BYTES))).digest()


def _read_on(path: Path, offset: int, room: Room) -> bytes | None:
    """A file's content from `offset` on; None where there is no room for it, or it is gone."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END) - offset
        taken = room.take(size, whole=not _is_log(path.name))
        file.seek(offset)
        return None if taken is None else file.read(taken)
    return None


def _settle(trial_dirs: Iterable[Path]) -> None:
    """Wait until nothing writes there any more."""
    until = time.monotonic() + SETTLED_S
    for trial_dir in trial_dirs:
        while trial_dir.is_dir() and not all_ended(trial_dir) and time.monotonic() < until:
            time.sleep(POLL_S)
