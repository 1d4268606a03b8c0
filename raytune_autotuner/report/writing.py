"""Files that are written whole or not at all, whatever ends the writer, and without secrets where they are JSON.

What is broken all the same (by a disk, by hand) is read as if it were not there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.masking import mask_values


def write_json(path: Path, value: Any, durable: bool = False) -> None:
    """Write JSON for people and programs, without secrets, whole or not at all."""
    text = json.dumps(mask_values(value), indent=2, allow_nan=False, default=str)
    write_text(path, text + "\n", durable=durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote of a mapping; None where nothing is there, or something broken.

    Raises `ConfigError` where it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}.") from error
    return found if isinstance(found, dict) else None


def append(path: Path, text: str) -> None:
    """Add `text` to `path`, through a power cut too; an error leaves the file as it was."""
    with path.open("ab", buffering=0) as file:
        size, left = file.tell(), text.encode("utf-8")
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def cut_half_line(path: Path) -> None:
    """Take away what follows the last line end: a line that a full disk or a power cut left unfinished."""
    if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)


def write_text(path: Path, text: str, *, durable: bool = False, mode: int | None = None) -> None:
    """Replace `path` by `text`, whole or not at all; `durable`: also through a power cut."""
    with atomically(path) as part:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if mode is not None:
            part.chmod(mode)


class atomically:
    """`with atomically(path) as part:` writes to `part`, which then replaces `path`; an error leaves `path` alone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")

    def __enter__(self) -> Path:
        return self._part

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._part.replace(self._path)
        finally:
            self._part.unlink(missing_ok=True)
