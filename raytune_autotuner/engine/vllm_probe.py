"""Asks the installed vLLM what it thinks of flags, values and settings. Runs as a script in the engine's own Python.

It answers questions for as long as its standard input stays open: one JSON object a line, one answer a line on standard
output. The import of vllm comes before the first answer and takes seconds; after it a setting takes milliseconds.

- The study's flags, `{"model": str, "args": [[name, value, argv]], "candidates": [[name, value, argv]]}`, where argv is
  the value as a list of arguments and `env:NAME` has none. Answer: `{"version", "unknown": {name: nearest | null},
  "rejected": [[name, value, why]], "defaults": {name: value}, "config_error": str | null}`; `defaults` are those in
  force once `args` are applied.
- One setting, `{"argv": [str], "env": {name: value}, "tell": [name]}`. Answer: `{"lines": [str], "exit_code": int,
  "in_force": {name: value}}`: the last lines of the log of a server that refuses it, with its exit code, or no lines
  and the values in force of the flags in `tell`.

A setting's own environment variables, and those that vLLM sets while it looks at one, are gone before the next.

The one file that imports vllm; nothing imports this file.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import logging
import os
import select
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

# A name, its value, and the value as arguments.
_Given = tuple[str, Any, list[str]]
_SECTIONS = ("scheduler_config", "cache_config", "model_config", "parallel_config", "load_config", "compilation_config")


def main() -> None:
    """Read questions and write answers until the asker is gone."""
    answers = _own_output()
    threading.Thread(target=_end_with_the_asker, daemon=True).start()
    parser = _server_parser()
    for line in sys.stdin:
        question = json.loads(line)
        answer = _check(parser, **question) if "argv" in question else _examine(parser, **question)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # vLLM's interpreter shutdown takes seconds and has nothing to save


def _own_output() -> TextIO:
    """Standard output for answers alone: whatever else is printed goes where errors go."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _end_with_the_asker() -> None:
    """End the process when the other end of standard input is closed, also in the middle of an import."""
    watch = select.poll()
    watch.register(0, 0)  # no event but the hang-up, which needs no asking for
    watch.poll()
    os._exit(0)


def _examine(parser: Any, model: str, args: list[_Given], candidates: list[_Given]) -> dict[str, Any]:
    import vllm

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
    logging.disable(logging.CRITICAL)  # a few lines for each setting, which nobody reads
    return make_arg_parser(FlexibleArgumentParser(prog="vllm"))


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
    parsed = parser.parse_args(argv)
    try:
        with _environment({}):
            return _in_force(_configured(parsed), parsed, names), None
    except Exception as error:  # noqa: BLE001  vLLM's checks raise errors of every kind
        text = str(error).splitlines()
        first = f"{type(error).__name__}: {text[0] if text else ''}"
        cause = next((line.strip() for line in text if "Value error, " in line), first)
        return {}, cause.removeprefix("Value error, ")


def _check(
    parser: argparse.ArgumentParser, argv: Sequence[str], env: Mapping[str, str], tell: Sequence[str]
) -> dict[str, Any]:
    said = io.StringIO()
    reached = ""
    try:
        with _environment(env), contextlib.redirect_stderr(said):
            parsed = parser.parse_args(argv)
            reached = "non-default args: those of the setting"  # the line that a server's log has here
            return {"lines": [], "exit_code": 0, "in_force": _in_force(_configured(parsed), parsed, tell)}
    except SystemExit as end:
        text = said.getvalue()
        lines = text[max(text.rfind("\n", 0, text.rfind(": error: ")), 0) :].splitlines()
        return {"lines": lines, "exit_code": end.code, "in_force": {}}
    except Exception:  # noqa: BLE001  vLLM's checks raise errors of every kind
        return {"lines": [reached, *traceback.format_exc().splitlines()], "exit_code": 1, "in_force": {}}


@contextlib.contextmanager
def _environment(extra: Mapping[str, str]) -> Iterator[None]:
    """With `extra` in the environment, which afterwards is what it was: vLLM's checks set variables of their own."""
    before = dict(os.environ)
    os.environ.update(extra)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _configured(parsed: argparse.Namespace) -> Any:
    """The configuration that a server would start with; raises what the server would end with."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    return AsyncEngineArgs.from_cli_args(parsed).create_engine_config(UsageContext.OPENAI_API_SERVER)


def _in_force(config: Any, parsed: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        value = _value(config, parsed, name)
        if isinstance(value, (str, int, float, bool)):
            found[name] = value
        elif type(value).__name__ == "dtype":
            found[name] = str(value).removeprefix("torch.")
    return found


def _value(config: Any, parsed: argparse.Namespace, name: str) -> Any:
    from vllm import envs

    if name.startswith("env:"):
        return getattr(envs, name.removeprefix("env:"), None)
    attribute = name.replace("-", "_")
    sections = (getattr(config, section, None) for section in _SECTIONS)
    value = next((getattr(s, attribute) for s in sections if hasattr(s, attribute)), None)
    return getattr(parsed, attribute, None) if value is None else value


def _nearest(name: str, known: set[str]) -> str | None:
    close = difflib.get_close_matches(name.replace("_", "-"), known, n=1)
    return close[0] if close else None


if __name__ == "__main__":
    main()
