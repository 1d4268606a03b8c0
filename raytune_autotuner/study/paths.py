"""A path as people write it, with `~` for a home folder. Nothing is opened or looked for."""

from __future__ import annotations

from pathlib import Path

from raytune_autotuner.study.errors import ConfigError, shown


def expanded(key: str, path: str | Path) -> Path:
    """`path` with the home folder in place of its `~`; raises `ConfigError`, which names `key`, for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}: {shown(str(path))}: there is no such home folder; write it in full.") from error
