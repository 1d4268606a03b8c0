"""HTML as text in which nothing but this module writes markup: whatever is put in is escaped.

    tag("td", "a < b", cls="number")   ->   <td class="number">a &lt; b</td>

Pieces that are markup already are `Markup`; a plain `str` never is.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

_VOID = {"input", "br", "meta", "link"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. `cls` and `for_` stand for `class` and `for`; `data_x` for `data-x`; None leaves an attribute out."""
    given = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    return Markup(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{join(children)}</{name}>")


def join(pieces: Iterable[object]) -> Markup:
    """The pieces one after the other, escaped where they are no markup."""
    return Markup("".join(piece if isinstance(piece, Markup) else html.escape(str(piece)) for piece in pieces))


def table(head: Sequence[object], body: Iterable[Sequence[object]], **attributes: object) -> Markup:
    """A table; a cell that is a `td` already stays as it is."""
    rows = (tag("tr", *(_cell(cell) for cell in cells)) for cells in body)
    top = tag("thead", tag("tr", *(_head(name) for name in head)))
    return tag("div", tag("table", top, tag("tbody", *rows), **attributes), cls="scroll", tabindex="0")


def number_cell(text: object, **attributes: object) -> Markup:
    """A cell of a table whose digits stand under each other."""
    return tag("td", text, cls="number", **attributes)


def json_text(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def number_head(text: object) -> Markup:
    """The head of a column of `number_cell`."""
    return tag("th", text, scope="col", cls="number")


def _head(cell: object) -> Markup:
    return cell if isinstance(cell, Markup) and cell.startswith("<th") else tag("th", cell, scope="col")


def _cell(cell: object) -> Markup:
    return cell if isinstance(cell, Markup) and cell.startswith("<td") else tag("td", cell)


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("cls", "class").replace("_", "-")
    return f' {name}="{html.escape(str(value))}"'
