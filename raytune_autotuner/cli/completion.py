"""What the Tab key offers for the `raytune-autotuner` script: commands, options, study files, results folders, trials.

The shell runs the script itself with `_ARGCOMPLETE` set; argcomplete then answers from the parser and ends the process.
What a word can be follows from its metavar, so a new command needs nothing here.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import argcomplete
from argcomplete.completers import DirectoriesCompleter, FilesCompleter
from argcomplete.shell_integration import shellcode


def shell_code(shell: str, program: str) -> str:
    """What `shell` is to read at its start."""
    return str(shellcode([program], shell=shell))


def answer_tab(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that asks, and end the process."""
    (commands,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    _say_run(commands)
    for command in (parser, *commands.values()):
        for action in command._actions:
            action.completer = _completer(action)
    argcomplete.autocomplete(parser, always_complete_options="long")


def _say_run(commands: Mapping[str, Any]) -> None:
    """Put in the word `run`, which people leave out, where a study file stands in its place."""
    program, blank, rest = os.environ["COMP_LINE"].partition(" ")
    first, more, _ = rest.lstrip().partition(" ")
    if blank and more and first not in commands and not first.startswith("-"):
        os.environ["COMP_LINE"] = f"{program} run {rest}"
        os.environ["COMP_POINT"] = str(int(os.environ["COMP_POINT"]) + len("run "))


def _completer(action: argparse.Action) -> Callable[..., Any] | None:
    if action.dest == "trial" and action.metavar in ("TRIAL", "N"):
        return _trials
    by_metavar = {"STUDY.yaml": _studies, "STUDY.yaml | COMMAND": _studies, "RESULTS": _runs, "PLACE": _folders}
    return by_metavar.get(str(action.metavar))


def _studies(prefix: str, **_: Any) -> list[str]:
    return _shown(prefix, FilesCompleter(("yaml", "yml")))


def _folders(prefix: str, **_: Any) -> list[str]:
    return _shown(prefix, DirectoriesCompleter())


def _runs(prefix: str, **_: Any) -> list[str]:
    """The results folders that `prefix` may become; other folders where there is none, as they may hold some."""
    folders = _folders(prefix)
    return [path for path in folders if (Path(path) / "study.yaml").is_file()] or folders


def _shown(prefix: str, completer: Callable[[str], Iterable[str]]) -> list[str]:
    """What is there, without hidden entries unless they are asked for."""
    hidden = os.path.basename(prefix).startswith(".")
    return [path for path in completer(prefix) if hidden or not os.path.basename(path.rstrip("/")).startswith(".")]


def _trials(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """The numbers of the trials of the folder that was named before."""
    run = getattr(parsed_args, "earlier", None) or getattr(parsed_args, "results", None) or "."
    folders = Path(run).glob("trials/[0-9]*-*")
    return sorted((folder.name.partition("-")[0] for folder in folders), key=int)
