"""Commands that read what a run left, or leaves: where it stands, its logs, its page, its winner in other forms."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from raytune_autotuner.cli.command import PROGRAM, Command, place
from raytune_autotuner.study.errors import OK, ConfigError

if TYPE_CHECKING:
    from raytune_autotuner.report.logs import Which

EXPORT_FORMS = ("vllm", "yaml", "docker", "compose", "k8s")


def _add_logs(logs: argparse.ArgumentParser) -> None:
    logs.add_argument("results", type=place, metavar="RESULTS")
    logs.add_argument("trial", type=int, nargs="?", metavar="TRIAL")
    logs.add_argument("--engine", action="store_true", help="the engine's own log")
    logs.add_argument("--load", action="store_true", help="the load client's log")
    logs.add_argument("-f", "--follow", action="store_true")
    logs.add_argument("--since", metavar="TIME", help="ISO time, or an age such as 10m")


def _logs(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.report.logs import read_log
    from raytune_autotuner.report.runs import folders_of, open_run

    which: Which = "engine" if arguments.engine else "load" if arguments.load else "trial"
    if arguments.trial is None and which != "trial":
        raise ConfigError(f"--{which} needs a trial's number: {PROGRAM} logs RESULTS TRIAL --{which}")
    folder = open_run(arguments.results, folders_of(arguments.trial))
    for line in read_log(folder, arguments.trial, which=which, since=arguments.since, follow=arguments.follow):
        print(line, flush=arguments.follow)
    return OK


def _add_status(status: argparse.ArgumentParser) -> None:
    status.add_argument("results", type=place, metavar="RESULTS")
    status.add_argument("-f", "--follow", action="store_true", help="the live table, until the study ends")
    status.add_argument("--json", action="store_true")


def _status(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.report.runs import keep_fresh, open_run
    from raytune_autotuner.report.summary import render_status, summarize
    from raytune_autotuner.report.terminal import follow, make_watcher

    folder = open_run(arguments.results, trials="")
    if arguments.follow:
        follow(folder, make_watcher(), keep_fresh(folder, ""))
    found = summarize(folder)
    print(json.dumps(found.to_dict()) if arguments.json else render_status(found))
    return OK


def _add_report(report: argparse.ArgumentParser) -> None:
    report.add_argument("results", type=place, metavar="RESULTS")


def _report(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.report.html.evidence import gather
    from raytune_autotuner.report.html.page import write_report
    from raytune_autotuner.report.runs import bring_back, open_run

    folder = open_run(arguments.results)
    evidence = gather(folder)
    print(bring_back(folder, write_report(folder, evidence)))
    for note in evidence.notes:
        print(note, file=sys.stderr)
    return OK


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("results", type=place, nargs="+", metavar="RESULTS")
    compare.add_argument("--output", type=Path, metavar="FILE", help="write a page with charts, too")
    compare.add_argument("--json", action="store_true")


def _compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from raytune_autotuner.report.compare import compare, terminal_table, write_comparison
    from raytune_autotuner.report.runs import open_run

    comparison = compare([open_run(run) for run in arguments.results])
    if arguments.output is not None:
        write_comparison(comparison, arguments.output)
    if arguments.json:
        print(json.dumps(comparison.to_dict()))
    else:
        Console(markup=False, highlight=False).print(terminal_table(comparison))
    return OK


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument("results", type=place, metavar="RESULTS")
    export.add_argument("--trial", type=int, metavar="N", help="another setting than the winner")
    form = "launch line, vLLM's --config file, docker run, Compose file, Kubernetes Deployment and Service"
    export.add_argument("--format", choices=EXPORT_FORMS, default="vllm", help=form)
    export.add_argument("--image", metavar="NAME:TAG", help="container image; default: vLLM's own, as was measured")


def _export(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.engine.flags import arguments as as_flags
    from raytune_autotuner.report.export import export
    from raytune_autotuner.report.runs import open_run

    folder = open_run(arguments.results)
    options = {"number": arguments.trial, "image": arguments.image}
    print(export(folder, arguments.format, as_flags=as_flags, **options), end="")
    return OK


COMMANDS = (
    Command("logs", "read the logs of a study or of one trial", _add_logs, _logs),
    Command("status", "where a study stands, also while it runs elsewhere", _add_status, _status),
    Command("report", "write report.html again, also for a study that runs or was killed", _add_report, _report),
    Command("compare", "several studies side by side: what differs, what each came to", _add_compare, _compare),
    Command("export", "the winner, or any trial, for where it is served", _add_export, _export),
)
