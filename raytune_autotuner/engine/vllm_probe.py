"""Asks the installed vLLM what it thinks of flags and values. Runs as a script in the engine's own Python.

In on stdin, JSON: `{"model": str, "args": [[name, value, argv]], "candidates": [[name, value, argv]]}`, where argv is
the value as a list of arguments; `env:NAME` has none.
Out on the last line of stdout, JSON: `{"version", "unknown": {name: nearest | null}, "rejected": [[name, value, why]],
"defaults": {name: value}, "config_error": str | null}`; `defaults` are those in force once `args` are applied.

The one file that imports vllm; nothing imports this file.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import os
import sys
from typing import Any

# A name, its value, and the value as arguments.
_Given = tuple[str, Any, list[str]]
_SECTIONS = ("scheduler_config", "cache_config", "model_config", "parallel_config", "load_config", "compilation_config")


def main() -> None:
    """Read the question, write the answer."""
    question = json.load(sys.stdin)
    answer = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        result = _examine(question["model"], question["args"], question["candidates"])
    answer.write("\n" + json.dumps(result) + "\n")
    answer.flush()
    os._exit(0)  # vLLM's interpreter shutdown takes seconds and has nothing to save


def _examine(model: str, args: list[_Given], candidates: list[_Given]) -> dict[str, Any]:
    import vllm

    parser = _server_parser()
    known = {option.lstrip("-").replace("_", "-") for option in parser._option_string_actions if "--" in option}
    asked = [given for given in (*args, *candidates) if not given[0].startswith("env:")]
    unknown = {name: _nearest(name, known) for name, _, _ in asked if name.partition(".")[0] not in known}
    rejected = [
        [name, value, why]
        for name, value, argv in asked
        if name not in unknown and (why := _complaint(parser, ["--model", model, *argv]))
    ]
    defaults: dict[str, Any] = {}
    error = None
    if not unknown and not rejected:
        names = list(dict.fromkeys(name for name, _, _ in candidates))
        defaults, error = _defaults(parser, ["--model", model, *(part for given in args for part in given[2])], names)
    return {
        "version": vllm.__version__,
        "unknown": unknown,
        "rejected": rejected,
        "defaults": defaults,
        "config_error": error,
    }


def _server_parser() -> Any:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before 0.32
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    return make_arg_parser(FlexibleArgumentParser())


def _complaint(parser: argparse.ArgumentParser, argv: list[str]) -> str | None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser.parse_args(argv)
    except SystemExit:
        lines = [line for line in said.getvalue().splitlines() if ": error: " in line]
        return lines[-1].split(": error: ", 1)[1] if lines else "refused by the engine's argument parser"
    except Exception as error:  # noqa: BLE001  whatever a flag's own type raises is vLLM's answer
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _defaults(parser: argparse.ArgumentParser, argv: list[str], names: list[str]) -> tuple[dict[str, Any], str | None]:
    from vllm import envs
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    parsed = parser.parse_args(argv)
    try:
        config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config(UsageContext.OPENAI_API_SERVER)
    except Exception as error:  # noqa: BLE001  vLLM's checks raise errors of every kind
        text = str(error).splitlines()
        first = f"{type(error).__name__}: {text[0] if text else ''}"
        cause = next((line.strip() for line in text if "Value error, " in line), first)
        return {}, cause.removeprefix("Value error, ")
    found: dict[str, Any] = {}
    for name in names:
        if name.startswith("env:"):
            value = getattr(envs, name.removeprefix("env:"), None)
        else:
            attribute = name.replace("-", "_")
            sections = (getattr(config, section, None) for section in _SECTIONS)
            value = next((getattr(s, attribute) for s in sections if hasattr(s, attribute)), None)
            value = getattr(parsed, attribute, None) if value is None else value
        if isinstance(value, (str, int, float, bool)):
            found[name] = value
        elif type(value).__name__ == "dtype":
            found[name] = str(value).removeprefix("torch.")
    return found, None


def _nearest(name: str, known: set[str]) -> str | None:
    close = difflib.get_close_matches(name.replace("_", "-"), known, n=1)
    return close[0] if close else None


if __name__ == "__main__":
    main()
