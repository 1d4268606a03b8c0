"""A setting as an engine takes it: command-line flags and environment variables.

In: names as they stand in a study (a flag without its dashes, or `env:NAME`) with plain values. It knows no engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from raytune_autotuner.engine.contract import Rank
from raytune_autotuner.study.space import format_value

_VARIABLE = "env:"
PARALLEL = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")


def flag(name: str, value: Any) -> list[str]:
    """`--name value`; `--no-name` for False, nothing for None, JSON for mappings and lists.

    >>> flag("block-size", 16), flag("enforce-eager", False), flag("seed", None), flag("nice", -1)
    (['--block-size', '16'], ['--no-enforce-eager'], [], ['--nice=-1'])
    >>> flag("compilation-config.use_inductor", False)
    ['--compilation-config.use_inductor', 'false']
    """
    if value is None:
        return []
    if isinstance(value, bool) and "." not in name:  # a key inside a configuration has no other form
        return [f"--{name}" if value else f"--no-{name}"]
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]


def parallel_size(setting: Mapping[str, Any]) -> int:
    """GPUs of a setting by the flags that vLLM and SGLang share: tensor x pipeline x data parallel size."""
    return math.prod(int(setting.get(name) or 1) for name in PARALLEL)


def rank_arguments(rank: Rank | None) -> list[str]:
    """The flags by which the ranks of vLLM on several nodes find each other; none for an engine on one."""
    if rank is None:
        return []
    others = ["--headless"] if rank.number else []
    place = ["--nnodes", str(rank.nodes), "--node-rank", str(rank.number)]
    return [*place, "--master-addr", rank.address, "--master-port", str(rank.port), *others]


def first_rank(nodes: int) -> list[str]:
    """Those of the rank that serves, for people: each further node's command ends in a rank of its own and --headless.

    >>> first_rank(1), first_rank(2)[:4]
    ([], ['--nnodes', '2', '--node-rank', '0'])
    """
    return rank_arguments(Rank(0, nodes, "ADDRESS_OF_THE_FIRST_NODE", 29501, "")) if nodes > 1 else []


def is_flag(name: str) -> bool:
    """Whether a name of a setting is a flag, and not an environment variable."""
    return not name.startswith(_VARIABLE)


def arguments(setting: Mapping[str, Any]) -> list[str]:
    """The flags of a setting, as an argument list."""
    return [part for name, value in setting.items() if is_flag(name) for part in flag(name, value)]


def environment(setting: Mapping[str, Any]) -> dict[str, str]:
    """The environment variables of a setting; one that is None is not set, as such a flag is left out."""
    variables = {name: value for name, value in setting.items() if not is_flag(name) and value is not None}
    return {name.removeprefix(_VARIABLE): format_value(value) for name, value in variables.items()}
