"""The command line as a whole: all commands, their parser, and every error as a message with an exit code.

What the codes mean stands in `manual.py`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import platform
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from raytune_autotuner import __version__
from raytune_autotuner.cli import machine, results, studies
from raytune_autotuner.cli.command import PROGRAM, SCRIPT
from raytune_autotuner.cli.manual import ARGUMENTS, OVERVIEW, PAGES, Page, below_options
from raytune_autotuner.study.errors import INTERRUPTED, NO_RESULT, WRONG_USE, AutotunerError, ConfigError
from raytune_autotuner.study.masking import mask

COMMANDS = {command.name: command for command in (*studies.COMMANDS, *results.COMMANDS, *machine.COMMANDS)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if "_ARGCOMPLETE" in os.environ:
            from raytune_autotuner.cli.completion import answer_tab

            answer_tab(make_parser())
        if arguments and arguments[0] not in {*COMMANDS, "-h", "--help", "--version"}:
            _refuse_mistyped_command(arguments[0])
            arguments.insert(0, "run")
        parsed = make_parser().parse_args(arguments)
        if platform.system() != "Linux":
            raise ConfigError(f"raytune_autotuner runs on Linux, but this is {platform.system()}.")
        return COMMANDS[parsed.command].run(parsed)
    except ConfigError as error:
        print(f"error: {mask(str(error))}", file=sys.stderr)
        return WRONG_USE
    except AutotunerError as error:
        print(f"error: {mask(str(error))}", file=sys.stderr)
        return NO_RESULT
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return NO_RESULT


class _Parser(argparse.ArgumentParser):
    """Tells wrong use as all other wrong use is told."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.\nSee {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line, each command with its page of the manual."""
    program = SCRIPT if Path(sys.argv[0]).name == SCRIPT else PROGRAM
    parser = _Parser(
        prog=program,
        description=OVERVIEW.about,
        epilog=below_options(OVERVIEW, program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"raytune_autotuner {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="STUDY.yaml | COMMAND")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.help)
        command.add_arguments(own)
        _teach(own, PAGES[name], program)
    return parser


def _teach(command: argparse.ArgumentParser, page: Page, program: str) -> None:
    """Put the manual's words into a command's `--help`."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.description = textwrap.fill(page.about, 100)
    command.epilog = below_options(page, program)
    for action in command._actions:
        action.help = action.help or ARGUMENTS.get(str(action.metavar), ARGUMENTS.get(action.dest))


def _refuse_mistyped_command(word: str) -> None:
    close = difflib.get_close_matches(word, COMMANDS, n=1)
    if close and not Path(word).exists():
        raise ConfigError(f"{word!r} is neither a command nor a file. Did you mean {close[0]!r}?")
