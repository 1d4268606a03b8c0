"""Asks the installed vLLM what it thinks of flags and values. Runs as a script in the engine's own Python.

In on stdin, JSON: `{"model": str, "args": {flag: value}, "candidates": {flag: [value, ...]}}`.
Out on the last line of stdout, JSON: `{"version", "unknown": {flag: nearest | null}, "rejected": [[flag, value, why]],
"defaults": {flag: value}, "config_error": str | null}`; `defaults` are those in force once `args` are applied.

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


def _examine(model: str, args: dict[str, Any], candidates: dict[str, list[Any]]) -> dict[str, Any]:
    import vllm

    parser = _server_parser()
    known = {option.lstrip("-").replace("_", "-") for option in parser._option_string_actions}
    asked = [name for name in (*args, *candidates) if not name.startswith("env:")]
    unknown = {name: _nearest(name, known) for name in asked if name.replace("_", "-") not in known}
    rejected = [
        [name, value, why]
        for name, values in {**{k: [v] for k, v in args.items()}, **candidates}.items()
        if name in asked and name not in unknown
        for value in values
        if (why := _complaint(parser, flag(name, value)))
    ]
    defaults: dict[str, Any] = {}
    error = None
    if not unknown and not any(name in args for name, _, _ in rejected):
        defaults, error = _defaults(parser, model, args, list(candidates))
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


def flag(name: str, value: Any) -> list[str]:
    """`--name value` as the engine's command line has it; `--no-name` for False, nothing for None."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]


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


def _defaults(
    parser: argparse.ArgumentParser, model: str, args: dict[str, Any], names: list[str]
) -> tuple[dict[str, Any], str | None]:
    from vllm import envs
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    argv = [part for name, value in args.items() if not name.startswith("env:") for part in flag(name, value)]
    parsed = parser.parse_args(["--model", model, *argv])
    try:
        config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config(UsageContext.OPENAI_API_SERVER)
    except Exception as error:  # noqa: BLE001  vLLM's checks raise errors of every kind
        text = str(error).splitlines()
        cause = next((line.strip() for line in text if "Value error, " in line), text[0] if text else "")
        return {}, cause.removeprefix("Value error, ") or type(error).__name__
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
