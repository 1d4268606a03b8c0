"""A study file as text, with comments above its keys: plain values and lines in, YAML out.

Values are written by the YAML library, so that any text comes back as it was; comments are one line each, whatever is
in them. It knows nothing of what a study means.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from raytune_autotuner.study.plain import dump_yaml

Path: TypeAlias = tuple[str, ...]
Comments: TypeAlias = Mapping[Path, Sequence[str]]
"""Lines to stand above a key, named by its path."""

_WIDTH = 120


def write_page(raw: Mapping[str, Any], comments: Comments, head: Sequence[str]) -> str:
    """The text of a study file."""
    lines = [*_commented(head, 0)]
    for key, value in raw.items():
        lines += ["", *_entry((key,), value, comments)]
    return "\n".join(lines) + "\n"


def scalar(value: Any) -> str:
    """A value on one line, as YAML reads it back.

    >>> scalar("a: b"), scalar("env:A"), scalar({"choice": ["0-1", 2, None]})
    ("'a: b'", 'env:A', '{choice: [0-1, 2, null]}')
    """
    options: dict[str, Any] = {"default_flow_style": True, "allow_unicode": False, "width": 10**9}
    if isinstance(value, str) and not value.isprintable():
        options["default_style"] = '"'  # other styles break lines where the text does
    return dump_yaml(value, **options).removesuffix("...\n").strip("\n")


def _entry(path: Path, value: Any, comments: Comments) -> Iterator[str]:
    depth = len(path) - 1
    indent = "  " * depth
    yield from _commented(comments.get(path, ()), depth)
    if isinstance(value, Mapping) and value and not _is_leaf(path):
        yield f"{indent}{scalar(path[-1])}:"
        for key, inner in value.items():
            yield from _entry((*path, key), inner, comments)
    elif isinstance(value, list) and value and not _plain(value):
        yield f"{indent}{scalar(path[-1])}:"
        yield from (f"{indent}  - {scalar(item)}" for item in value)
    else:
        yield f"{indent}{scalar(path[-1])}: {scalar(value)}"


def _is_leaf(path: Path) -> bool:
    """Whether a mapping there is one value to a reader, on one line: a distribution, the limits of a latency."""
    return len(path) > 2 or (len(path) == 2 and path[0] == "search_space")


def _plain(values: Sequence[Any]) -> bool:
    """Whether a list is short enough for one line: numbers."""
    return all(isinstance(value, (int, float)) for value in values)


def _commented(lines: Sequence[str], depth: int) -> Iterator[str]:
    start = "  " * depth + "# "
    for line in lines:
        whole = "".join(character if character.isprintable() else "?" for character in line)
        wrapped = textwrap.wrap(whole, _WIDTH - len(start), break_long_words=False, break_on_hyphens=False)
        yield from (f"{start}{part}".rstrip() for part in wrapped or [""])
