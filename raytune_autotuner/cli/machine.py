"""Commands about this machine: an engine's log, what a crash left running, the shell."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from raytune_autotuner.cli.command import DEFAULT_RESULTS, SCRIPT, Command, place
from raytune_autotuner.study.errors import OK, ConfigError


def _add_diagnose(diagnose: argparse.ArgumentParser) -> None:
    diagnose.add_argument("log", type=Path, metavar="ENGINE_LOG", help="a file, or - for standard input")
    diagnose.add_argument("--exit-code", type=int, help="of the engine, negative or above 128 for a signal")
    diagnose.add_argument("--json", action="store_true")


def _diagnose(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.engine.reading import diagnose

    try:
        source = _stdin() if str(arguments.log) == "-" else arguments.log
        with open(source, encoding="utf-8", errors="replace", closefd=source is arguments.log) as lines:
            diagnosis = diagnose(lines, exit_code=arguments.exit_code)
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"{arguments.log}: cannot be read: {why}. Name an engine's log, or - for stdin.") from error
    failure = diagnosis.failure
    stage = None if diagnosis.stage is None else str(diagnosis.stage)
    found: dict[str, str | None] = {"stage": stage, "kind": None, "blame": None, "evidence": None, "remedy": None}
    if failure is not None:
        found |= {name: str(getattr(failure, name)) or None for name in found}
    if arguments.json:
        print(json.dumps(found))
    elif failure is None:
        print(f"no failure; stage reached: {stage or 'none'}")
    else:
        print("\n".join(f"{name:<9} {value or '-'}" for name, value in found.items()))
    return OK


def _stdin() -> int:
    if sys.stdin is None:  # as Python has it where the descriptor is closed
        raise OSError("standard input is closed")
    return sys.stdin.fileno()


def _add_clean(clean: argparse.ArgumentParser) -> None:
    clean.add_argument("--results", type=place, default=Path(DEFAULT_RESULTS), metavar="PLACE")
    clean.add_argument("--json", action="store_true")


def _clean(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.engine.processes import sweep_orphans
    from raytune_autotuner.report.results import ResultsFolder
    from raytune_autotuner.report.runs import kept_in

    ended = sweep_orphans()
    parent = arguments.results if isinstance(arguments.results, Path) else kept_in(arguments.results)
    runs = ResultsFolder.runs(parent)
    sizes = {run.path: sum(f.stat().st_size for f in run.path.rglob("*") if f.is_file()) for run in runs}
    if arguments.json:
        answer = {"ended": [pid for pid, _ in ended], "results": {str(path): size for path, size in sizes.items()}}
        print(json.dumps(answer))
        return OK
    print(f"{len(ended)} left-over process{'' if len(ended) == 1 else 'es'} ended.")
    for path, size in sizes.items():
        print(f"{size / 1e6:10.1f} MB  {path}")
    total = f"{sum(sizes.values()) / 1e6:10.1f} MB  in {len(sizes)} runs under {parent}"
    print(f"{total}; delete what you do not need.")
    return OK


def _add_completion(completion: argparse.ArgumentParser) -> None:
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))


def _completion(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.cli.completion import shell_code

    print(shell_code(arguments.shell, SCRIPT))
    return OK


COMMANDS = (
    Command("diagnose", "why an engine failed, read from its log", _add_diagnose, _diagnose),
    Command("clean", "end what a crash left running; say what old results weigh", _add_clean, _clean),
    Command("completion", "what makes Tab complete commands, options and files", _add_completion, _completion),
)
