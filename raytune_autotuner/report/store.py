"""A place for results that is no folder of this machine: an object store, or a shared path, by its URI.

`place` tells a URI from a folder. pyarrow's file systems do the work, and find credentials where they always do: in
environment variables, in their own files, at the cloud's instance. A URI never holds any, so that it can be printed.

An object is whole or absent, and nothing is ever deleted. Whatever goes wrong is an `OSError`. Knows nothing of what is
kept there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit

from raytune_autotuner.study.errors import ConfigError, shown
from raytune_autotuner.study.masking import is_secret, mask
from raytune_autotuner.study.paths import expanded

SCHEMES = ("s3", "gs", "file")
PROBE = ".raytune_autotuner"
"""What is written to find out whether a store can be written; it stays, as nothing is deleted."""
_DEFAULTS = {
    "s3": ("allow_delayed_open", "true"),  # a small object in one request, not in three
    "gs": ("retry_limit_seconds", "10"),  # else it tries for 15 minutes
}
_ENDPOINT = "endpoint_override"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


@dataclass(frozen=True)
class Entry:
    """An object, as a listing shows it."""

    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Store:
    """A folder of a store; `store / name` is one inside of it."""

    uri: str

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> Store:
        path, mark, query = self.uri.partition("?")
        return Store(f"{path.rstrip('/')}/{name}{mark}{query}")

    @property
    def parent(self) -> Store:
        """The folder that this one is in."""
        path, mark, query = self.uri.partition("?")
        return Store(f"{path.rpartition('/')[0]}{mark}{query}")

    @property
    def local(self) -> Path:
        """A relative path for its copies on a machine: `s3-localhost-9000/bucket/path`."""
        parts = urlsplit(self.uri)
        endpoint = parse_qs(parts.query).get(_ENDPOINT, [""])[0] or (_endpoint() if parts.scheme == "s3" else "")
        scheme = "-".join(filter(None, [parts.scheme, *re.split(r"[^\w.]+", endpoint)]))
        return Path(scheme, parts.netloc, parts.path.strip("/"))

    def files(self, under: str = "", recursive: bool = True) -> dict[str, Entry]:
        """The objects in the folder `under`, by their names from here."""
        found = self._list(under, recursive)
        return {name: Entry(info.size, info.mtime_ns) for name, info in found.items() if info.is_file}

    def folders(self, under: str = "") -> list[str]:
        """The names of the folders right in the folder `under`."""
        return sorted(PurePosixPath(name).name for name, info in self._list(under, False).items() if not info.is_file)

    def read(self, name: str, offset: int = 0) -> bytes:
        """An object's content from `offset` on."""
        files, root = self._opened
        with files.open_input_file(f"{root}/{name}") as source:
            source.seek(offset)
            content: bytes = source.read()
        return content

    def write(self, name: str, content: bytes) -> None:
        """Put an object there, in place of the one before."""
        files, root = self._opened
        path = f"{root}/{name}"
        if files.type_name != "local":
            _write(files, path, content)
            return
        # Stores show an object once it is whole, but a folder shows a file while it is being written.
        folder, _, last = path.rpartition("/")
        part = f"{folder}/.{last}.{os.getpid()}.part"
        files.create_dir(folder, recursive=True)
        _write(files, part, content)
        files.move(part, path)

    def check_writable(self) -> None:
        """Raise `ConfigError` where nothing can be written or listed, by trying it."""
        try:
            self.write(PROBE, b"raytune_autotuner keeps results of studies in this folder.\n")
            self.folders()
        except OSError as error:
            raise ConfigError(
                f"results {self}: cannot be written: {reason(error)}\n"
                "Is the bucket there, and are credentials in the environment or on this machine?"
            ) from error

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """pyarrow's file system, and the path in it."""
        import pyarrow
        from pyarrow.fs import FileSystem

        try:
            files, root = FileSystem.from_uri(_with_defaults(self.uri))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
            raise ConfigError(f"results {self}: {reason(error)}") from error
        return files, str(root).rstrip("/")

    def _list(self, under: str, recursive: bool) -> Mapping[str, Any]:
        from pyarrow.fs import FileSelector

        files, root = self._opened
        base = f"{root}/{under}" if under else root
        found = files.get_file_info(FileSelector(base, recursive=recursive, allow_not_found=True))
        names = {info.path.removeprefix(f"{root}/"): info for info in found}
        return {name: info for name, info in names.items() if is_inside(name)}


def place(text: str, in_study: bool = False) -> Path | Store:
    """A folder's path, or a store where `text` is a URI; raises `ConfigError` for a URI that cannot be one.

    One that stands in a study may not choose an endpoint, to which this machine's credentials would go.
    """
    scheme, _, rest = text.partition(":")
    if not rest.startswith("//"):
        if rest and scheme in SCHEMES:
            raise ConfigError(f"results {shown(text)}: write it as {_example(scheme)}.")
        return expanded("results", text)
    if scheme not in SCHEMES:
        raise ConfigError(f"results {scheme}://...: takes a folder, or a URI of {', '.join(SCHEMES)}.")
    parts = urlsplit(text)
    if set("@:") & set(parts.netloc) or "@" in parts.query or any(map(is_secret, parse_qs(parts.query))):
        # Not shown: it may hold a key.
        raise ConfigError(
            f"results {scheme}://...: a URI holds a bucket and a path, no user, key, password or port. Credentials "
            "come from the environment or the machine; another endpoint is ?endpoint_override=HOST:PORT&scheme=http."
        )
    if (scheme == "file") == bool(parts.netloc) or not is_inside(parts.path.strip("/")):
        raise ConfigError(f"results {shown(text)}: write it as {_example(scheme)}.")
    if in_study and _ENDPOINT in parse_qs(parts.query):
        raise ConfigError(
            f"results {shown(text)}: a study may not name an endpoint, as credentials go there. Set AWS_ENDPOINT_URL, "
            "or write the URI on the command line."
        )
    return Store(text.rstrip("/"))


def reason(error: Exception) -> str:
    """What a file system says, on one line and without secrets."""
    return mask(" ".join(str(error).split()))


def is_inside(name: str) -> bool:
    """Whether a relative name stays in its folder; those in a store are chosen by whoever can write there."""
    return ".." not in PurePosixPath(name).parts and not name.startswith("/")


def _example(scheme: str) -> str:
    return "file:///shared/results" if scheme == "file" else f"{scheme}://bucket/path"


def _write(files: Any, path: str, content: bytes) -> None:
    # By default, pyarrow compresses by the name's ending.
    with files.open_output_stream(path, compression=None) as target:
        target.write(content)


def _endpoint() -> str:
    return next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")


def _with_defaults(uri: str) -> str:
    parts = urlsplit(uri)
    name, value = _DEFAULTS.get(parts.scheme, ("", ""))
    if not name or name in parse_qs(parts.query):
        return uri
    return f"{uri}{'&' if parts.query else '?'}{name}={value}"
