"""Plain YAML: text to values, with the line of each key, and values to text.

Without tags, without aliases (whose expansion need not end), without keys that stand twice, and not nested deeply. What
is wrong with a text is a `ConfigError` with its place. What the values mean is for others to know.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from raytune_autotuner.study.errors import ConfigError, shown

MAX_DEPTH = 20
_OTHER_BREAKS = frozenset("\x85\u2028\u2029")


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node; raises `MarkedYAMLError` for what a study may not hold."""
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _refusal(event, "aliases (*name) are not supported; write the value out")
        if getattr(event, "tag", None) is not None:
            raise _refusal(event, "tags (!name) are not supported; write a plain value")
        if self.depth > MAX_DEPTH:
            raise _refusal(event, f"nested more than {MAX_DEPTH} levels deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _refusal(event: yaml.Event, why: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=why, problem_mark=event.start_mark)  # type: ignore[arg-type]


def parse_yaml(text: str, source: str) -> tuple[Any, dict[str, int]]:
    """What the text holds, and the line of each dotted key, counted from 1."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines = dict(_lines(node, source))
        return loader.construct_document(node), lines
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{source}: broken YAML: {_yaml_problem(error)}") from error


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})." if mark else f"{problem}."


def _lines(node: yaml.Node, source: str, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted key to line number, counted from 1; refuses keys that stand twice."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield f"{prefix}[{index}]", item.start_mark.line + 1
            yield from _lines(item, source, f"{prefix}[{index}]")
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in seen or key == "<<":
                why = "stands twice; leave one out" if key in seen else "is not supported; write the keys out"
                raise ConfigError(f"{source}, line {line}: key {shown(key)} {why}.")
            seen.add(key)
            yield (path := f"{prefix}.{key}" if prefix else key), line
            yield from _lines(value, source, path)


def dump_yaml(value: Any, **options: Any) -> str:
    """`value` as YAML with its keys in their order; `options` are those of `yaml.dump`."""
    return str(
        yaml.dump(value, Dumper=_Dumper, **{"sort_keys": False, "allow_unicode": True, "width": 1000, **options})
    )


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    """In quotes that escape the rarer line breaks, which PyYAML else writes in a way that reads as another text."""
    style = '"' if _OTHER_BREAKS & set(value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
