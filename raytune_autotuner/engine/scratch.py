"""An engine's temporary files: a folder of its own, which goes when the engine does.

Whoever is ended by SIGKILL leaves its sockets and folders behind, and vLLM leaves some even when it is asked to end. So
each engine gets a `TMPDIR` of its own. A lock on the folder says that its engine may still live: what is left of one
whose supervisor was killed, too, is found later. Standard library only; it knows nothing of engines.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

_MAX_BASE_BYTES = 56
"""A socket's path has room for 107 bytes, of which vLLM's sockets take 37 and our folder's name some more."""


class Scratch:
    """A folder for temporary files below the `TMPDIR` of `env`; a context manager that removes it with all it holds.

    There is none, and the engine uses what `env` says, where none can be made, or the path would be too long for the
    sockets in it.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._base = _base(env)
        self._env = env
        self._fd: int | None = None
        self.path: Path | None = None

    def __enter__(self) -> Scratch:
        self.make()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def make(self) -> None:
        """Make the folder, where one can be."""
        if len(os.fsencode(self._base)) <= _MAX_BASE_BYTES:
            with suppress(OSError):
                self._make()

    def _make(self) -> None:
        path = Path(tempfile.mkdtemp(prefix=_prefix(), dir=self._base))
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path = path

    @property
    def variables(self) -> dict[str, str]:
        """What `env` needs so that it is used. What torch compiles stays where it always is, for the next engine."""
        if self.path is None:
            return {}
        compiled = self._env.get("TORCHINDUCTOR_CACHE_DIR") or str(self._base / f"torchinductor_{_user()}")
        return {"TMPDIR": str(self.path), "TORCHINDUCTOR_CACHE_DIR": compiled}

    def remove(self) -> None:
        """Remove the folder; nothing happens where it is gone."""
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path = None
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def remove_orphans(env: Mapping[str, str]) -> list[Path]:
    """Remove this user's folders below the `TMPDIR` of `env` that nobody holds any more; their paths."""
    return [path for path in _base(env).glob(f"{_prefix()}*") if _remove_unheld(path)]


def _remove_unheld(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        shutil.rmtree(path, ignore_errors=True)
        return True
    finally:
        os.close(fd)


def _base(env: Mapping[str, str]) -> Path:
    return Path(env.get("TMPDIR") or "/tmp").absolute()


def _prefix() -> str:
    return f"rta{os.geteuid()}-"


def _user() -> str:
    try:
        return getpass.getuser().replace("/", "_")
    except (KeyError, OSError):
        return f"uid_{os.geteuid()}"
