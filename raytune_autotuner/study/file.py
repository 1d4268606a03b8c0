"""A study file, read.

`load_study` reads a YAML file (and `--set` overrides) into a `Study`; whatever is wrong with it is a `ConfigError`
that names file, line, key, value and what would be right. It knows where each key stands; what a key may hold is the
models' to say (`study.py`).
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from raytune_autotuner.study.errors import ConfigError, shown
from raytune_autotuner.study.plain import parse_yaml
from raytune_autotuner.study.space import Params
from raytune_autotuner.study.spaces import written_out
from raytune_autotuner.study.study import Study

MAX_STUDY_BYTES = 250_000
MAX_INTEGER = 2**63
MAX_KEY_CHARACTERS = 200


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file; `overrides` are `key.path=value` with YAML values.

    Raises `ConfigError` for a missing or unreadable file, broken YAML, and whatever `Study` refuses.
    """
    raw, lines = parse_yaml(_read(path), str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a study is a mapping of keys, but this file holds {type(raw).__name__}.")
    places = {key: f"{path}, line {line}" for key, line in lines.items()}
    for override in overrides:
        key = _override(raw, override)
        places = {known: place for known, place in places.items() if not _is_below(known, key)}
        places[key] = f"--set {shown(override)}"
    raw = written_out(raw, lambda file: parse_yaml(_read(file), str(file))[0])
    return parse_study(raw, source=str(path), places=places)


def parse_study(raw: Mapping[str, Any], source: str = "study", places: Mapping[str, str] | None = None) -> Study:
    """A `Study` from plain values; raises `ConfigError` that names the place of the wrong key.

    `places` says where each dotted key stands, as far as that is known; elsewhere the place is `source`.
    """
    places = places or {}
    for key, why in _not_plain(raw, ""):
        raise ConfigError(f"{_place(source, key, places)}: {key or 'study'}: {why}.")
    _reject_unknown_keys(raw, Study, "", source, places)
    try:
        return Study.model_validate(raw)
    except ConfigError as error:
        found = re.match(r"[\w.:\[\]-]+", str(error))
        key = found[0].rstrip(":") if found else ""
        raise ConfigError(f"{_place(source, key, places)}: {error}") from error
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, source, places)[:3])) from error


def read_params(texts: Sequence[str]) -> Params:
    """A setting from `name=value` with YAML values; raises `ConfigError`."""
    params: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        where = f"--param {shown(text)}"
        if not separator or not name:
            raise ConfigError(f"{where}: write name=value, such as --param max-num-seqs=32.")
        params[name], _ = parse_yaml(value, where)
        for _, why in _not_plain(params[name], name):
            raise ConfigError(f"{where}: {why}.")
    return params


def _read(path: Path) -> str:
    try:
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder; name the study's YAML file.")
        with path.open("rb") as file:
            content = file.read(MAX_STUDY_BYTES + 1)
        if len(content) > MAX_STUDY_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_STUDY_BYTES:,} bytes; is it a study file?")
        return content.decode("utf-8")
    except FileNotFoundError as error:
        nearby = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f" In that folder: {', '.join(nearby[:5])}." if nearby else " Name the study's YAML file."
        raise ConfigError(f"{path}: no such file.{hint}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text in UTF-8 (byte {error.start + 1}); is it a study file?") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _override(raw: dict[str, Any], override: str) -> str:
    """Apply `key.path=value`; returns the key."""
    key, separator, text = override.partition("=")
    where = f"--set {shown(override)}"
    if not separator or not key:
        raise ConfigError(f"{where}: write key.path=value, such as --set search.trials=4.")
    value, _ = parse_yaml(text, where)
    target, *parts = key.split(".")
    node = raw
    for part in parts:
        child = node.setdefault(target, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{where}: {shown(target)} is {shown(child)}, not a mapping.")
        node, target = child, part
    node[target] = value
    return key


def _is_below(known: str, key: str) -> bool:
    """Whether the dotted key `known` is `key` or stands inside it."""
    return known == key or known.startswith((f"{key}.", f"{key}["))


def _not_plain(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """What JSON could not hold, as (dotted key, what is wrong): dates, NaN, integers without end, keys of numbers."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                yield key, f"the key {shown(name)} is not text; put it in quotes"
            elif not name.isprintable() or len(name) > MAX_KEY_CHARACTERS:
                yield key, f"{shown(name)} is no key: too long, or with characters that cannot be seen"
            else:
                yield from _not_plain(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _not_plain(inner, f"{key}[{index}]")
    elif isinstance(value, str):
        if re.search(r"[\0\ud800-\udfff]", value):
            yield key, f"{shown(value)} holds a character that no file or command line can"
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield key, f"{value} is not a finite number"
    elif isinstance(value, int):
        if abs(value) >= MAX_INTEGER:
            yield key, f"an integer is less than {MAX_INTEGER}, but got {shown(value)}"
    elif value is not None:
        yield key, f"{shown(value)} is neither text nor a number; put it in quotes where text is meant"


def _place(source: str, key: str, places: Mapping[str, str]) -> str:
    probe = key
    while probe:
        if probe in places:
            return places[probe]
        probe = probe[: max(probe.rfind("."), probe.rfind("["), 0)]
    return source


def _submodel(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next((model for arg in get_args(annotation) if (model := _submodel(arg))), None)
    return None


def _reject_unknown_keys(
    raw: Mapping[Any, Any], model: type[BaseModel], prefix: str, source: str, places: Mapping[str, str]
) -> None:
    for key, value in raw.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if key not in model.model_fields:
            nearest = _nearest(str(key), prefix, model)
            raise ConfigError(
                f"{_place(source, path, places)}: unknown key {shown(key)} in {prefix or 'the study'}. "
                + (f"Did you mean {nearest!r}?" if nearest else f"It takes {', '.join(model.model_fields)}.")
            )
        submodel = _submodel(model.model_fields[key].annotation)
        if submodel and isinstance(value, Mapping):
            _reject_unknown_keys(value, submodel, path, source, places)


def _nearest(key: str, prefix: str, model: type[BaseModel]) -> str | None:
    """The right key: alike in this place, or the same name in another place."""
    if close := difflib.get_close_matches(key, model.model_fields, n=1):
        return f"{prefix}.{close[0]}" if prefix else close[0]
    everywhere = {path.rsplit(".", 1)[-1]: path for path in _all_keys(Study, "")}
    close = difflib.get_close_matches(key, everywhere, n=1, cutoff=0.75)
    return everywhere[close[0]] if close else None


def _all_keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        path = f"{prefix}.{name}" if prefix else name
        yield path
        if submodel := _submodel(field.annotation):
            yield from _all_keys(submodel, path)


def _explain(error: ValidationError, source: str, places: Mapping[str, str]) -> list[str]:
    """A line for each wrong key: place, key, what is wrong, the value."""
    messages: dict[str, str] = {}
    for detail in error.errors():
        parts = [
            part for part in detail["loc"] if isinstance(part, int) or not re.search(r"[\[( ]|^constrained", str(part))
        ]
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
        key = re.sub(r"\.(float|int|auto|literal)$", "", key)
        if detail["type"] == "missing":
            message = "is missing"
        else:
            value = detail.get("input")
            got = f", but got {shown(value)}" if not isinstance(value, (Mapping, BaseModel)) else ""
            message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ") + got
            message = f"should be {message}" if detail["msg"].startswith("Input should be") else message
        messages.setdefault(key, f"{_place(source, key, places)}: {key or 'study'}: {message}.")
    return list(messages.values())
