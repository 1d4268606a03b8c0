"""The front door: arguments in, exit code out. What the codes mean stands in `manual.py`."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import platform
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from raytune_autotuner import __version__
from raytune_autotuner.manual import (
    ARGUMENTS,
    INTERRUPTED,
    NO_RESULT,
    OK,
    OVERVIEW,
    PAGES,
    WRONG_USE,
    Page,
    below_options,
)
from raytune_autotuner.study.errors import AutotunerError, ConfigError
from raytune_autotuner.study.masking import mask

if TYPE_CHECKING:
    from raytune_autotuner.report.store import Store
    from raytune_autotuner.study.study import Study

DEFAULT_RESULTS = "results"
_PROGRAM = "python -m raytune_autotuner"
_FORMS = ("vllm", "yaml", "docker", "compose", "k8s")
_SCRIPT = "raytune-autotuner"
"""The same program under the name that an installation gives it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if "_ARGCOMPLETE" in os.environ:
            from raytune_autotuner.completion import answer_tab

            answer_tab(_parser())
        if arguments and arguments[0] not in {*_COMMANDS, "-h", "--help", "--version"}:
            _refuse_mistyped_command(arguments[0])
            arguments.insert(0, "run")
        parsed = _parser().parse_args(arguments)
        if platform.system() != "Linux":
            raise ConfigError(f"raytune_autotuner runs on Linux, but this is {platform.system()}.")
        return int(_COMMANDS[parsed.command](parsed))
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


def _run(arguments: argparse.Namespace) -> int:
    study = _load(arguments, _address(arguments))
    from raytune_autotuner.tune.run import run_study

    return run_study(study, _results(arguments, study), resume=arguments.resume, verbose=arguments.verbose)


def _verify(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.report.runs import open_run
    from raytune_autotuner.tune.run import run_study
    from raytune_autotuner.tune.verify import study_to_verify

    earlier = open_run(arguments.earlier, trials="")
    overrides = [*arguments.set, *_address(arguments)]
    study, verifies = study_to_verify(earlier, arguments.trial, arguments.restarts, overrides)
    results = arguments.results or earlier.parent
    return run_study(study, results, resume=arguments.resume, verbose=arguments.verbose, verifies=verifies)


def _address(arguments: argparse.Namespace) -> list[str]:
    """`--address` as an override of the study."""
    return [] if arguments.address is None else [f"ray.address={json.dumps(arguments.address)}"]


def _check(arguments: argparse.Namespace) -> int:
    study = _load(arguments)
    from raytune_autotuner.tune.explain import explain, render

    explained = explain(study, _results(arguments, study))
    print(json.dumps(explained.to_dict()) if arguments.json else render(explained))
    return OK


def _bench(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.study.file import read_params
    from raytune_autotuner.tune.bench import Start, earlier_setting, run_bench

    if arguments.trial is not None:
        start = earlier_setting(*arguments.trial)
    elif arguments.study is not None:
        start = Start(arguments.study)
    else:
        raise ConfigError(f"bench needs a study file, or a trial to repeat: {_PROGRAM} bench --trial RESULTS N")
    study = _load_study(arguments.study or start.study_file, arguments.set)
    params = {**start.params, **read_params(arguments.param)}
    return run_bench(study, params, _results(arguments, study), restart=start.restart, as_json=arguments.json)


def _load(arguments: argparse.Namespace, more: Sequence[str] = ()) -> Study:
    """The study that a command line names, with its overrides and `more` of them."""
    trials = [] if arguments.trials is None else [f"search.trials={arguments.trials}"]
    return _load_study(arguments.study, [*arguments.set, *trials, *more])


def _load_study(file: Path, overrides: Sequence[str]) -> Study:
    from raytune_autotuner.engine import models
    from raytune_autotuner.study.file import load_study

    study = load_study(file, overrides)
    return study.model_copy(update={"model": models.absolute(study.model)})


def _results(arguments: argparse.Namespace, study: Study) -> Path | Store:
    """Where the study's runs lie: as the command line says, or the study, or in `results`."""
    from raytune_autotuner.report.store import place

    return arguments.results or place(study.results or DEFAULT_RESULTS, in_study=True)


def _place(text: str) -> Path | Store:
    from raytune_autotuner.report.store import place

    return place(text)


def _logs(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.report.logs import Which, read_log
    from raytune_autotuner.report.runs import folders_of, open_run

    which: Which = "engine" if arguments.engine else "load" if arguments.load else "trial"
    if arguments.trial is None and which != "trial":
        raise ConfigError(f"--{which} needs a trial's number: {_PROGRAM} logs RESULTS TRIAL --{which}")
    folder = open_run(arguments.results, folders_of(arguments.trial))
    for line in read_log(folder, arguments.trial, which=which, since=arguments.since, follow=arguments.follow):
        print(line, flush=arguments.follow)
    return OK


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


def _diagnose(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.engine.reading import diagnose

    source = sys.stdin.fileno() if str(arguments.log) == "-" else arguments.log
    try:
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


def _clean(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.engine.processes import sweep_orphans
    from raytune_autotuner.report.results import ResultsFolder
    from raytune_autotuner.report.runs import kept_in

    ended = sweep_orphans()
    place = arguments.results if isinstance(arguments.results, Path) else kept_in(arguments.results)
    runs = ResultsFolder.runs(place)
    sizes = {run.path: sum(f.stat().st_size for f in run.path.rglob("*") if f.is_file()) for run in runs}
    if arguments.json:
        answer = {"ended": [pid for pid, _ in ended], "results": {str(path): size for path, size in sizes.items()}}
        print(json.dumps(answer))
        return OK
    print(f"{len(ended)} left-over process{'' if len(ended) == 1 else 'es'} ended.")
    for path, size in sizes.items():
        print(f"{size / 1e6:10.1f} MB  {path}")
    total = f"{sum(sizes.values()) / 1e6:10.1f} MB  in {len(sizes)} runs under {place}"
    print(f"{total}; delete what you do not need.")
    return OK


def _report(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.report.html.page import write_report
    from raytune_autotuner.report.runs import bring_back, open_run

    folder = open_run(arguments.results)
    print(bring_back(folder, write_report(folder)))
    return OK


def _compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from raytune_autotuner.report.compare import compare, terminal_table, write_comparison
    from raytune_autotuner.report.runs import open_run

    comparison = compare([open_run(place) for place in arguments.results])
    if arguments.output is not None:
        write_comparison(comparison, arguments.output)
    if arguments.json:
        print(json.dumps(comparison.to_dict()))
    else:
        Console(markup=False, highlight=False).print(terminal_table(comparison))
    return OK


def _export(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.engine.flags import arguments as as_flags
    from raytune_autotuner.report.export import export
    from raytune_autotuner.report.runs import open_run

    folder = open_run(arguments.results)
    options = {"number": arguments.trial, "image": arguments.image}
    print(export(folder, arguments.format, as_flags=as_flags, **options), end="")
    return OK


def _schema(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.study.schema import json_schema

    print(json.dumps(json_schema(), indent=1))
    return OK


def _init(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.tune.proposal import facts
    from raytune_autotuner.tune.proposal.draft import propose, summary
    from raytune_autotuner.tune.proposal.wishes import parse_wishes

    output: Path | None = arguments.output
    if output is not None and output.exists():
        raise ConfigError(f"--output {output}: exists already; name another file, or remove it.")
    python: Path | None = arguments.python
    wishes = parse_wishes(arguments.model, arguments.traffic, arguments.slo, arguments.minutes, python)
    model, address = facts.look_at_model(wishes.model, python), arguments.address
    if address:
        site = facts.look_at_cluster(model.name, address, python)
    else:
        site = facts.look_at_this_machine(model.name, python)
    proposal = propose(wishes, model, site, arguments.results)
    if output is None:
        print(proposal.text, end="")
    else:
        _write(output, proposal.text)
    print(summary(proposal, f"{_PROGRAM} {shlex.quote(str(output or 'STUDY.yaml'))}"), file=sys.stderr)
    return OK


def _write(path: Path, text: str) -> None:
    """Write a new file; raises `ConfigError` where that cannot be."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror or error}.") from error


def _completion(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.completion import shell_code

    print(shell_code(arguments.shell, _SCRIPT))
    return OK


_COMMANDS = {
    "run": _run,
    "init": _init,
    "verify": _verify,
    "check": _check,
    "bench": _bench,
    "logs": _logs,
    "status": _status,
    "report": _report,
    "compare": _compare,
    "export": _export,
    "schema": _schema,
    "diagnose": _diagnose,
    "clean": _clean,
    "completion": _completion,
}


class _Parser(argparse.ArgumentParser):
    """Tells wrong use as all other wrong use is told."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.\nSee {self.prog} --help")


def _refuse_mistyped_command(word: str) -> None:
    close = difflib.get_close_matches(word, _COMMANDS, n=1)
    if close and not Path(word).exists():
        raise ConfigError(f"{word!r} is neither a command nor a file. Did you mean {close[0]!r}?")


def _parser() -> argparse.ArgumentParser:
    program = _SCRIPT if Path(sys.argv[0]).name == _SCRIPT else _PROGRAM
    parser = _Parser(
        prog=program,
        description=OVERVIEW.about,
        epilog=below_options(OVERVIEW, program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"raytune_autotuner {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="STUDY.yaml | COMMAND")
    _add_run(commands.add_parser("run", help="run a study; the word `run` may be left out"))
    _add_init(commands.add_parser("init", help="write a study for a model that fits this machine, ready to run"))
    _add_verify(commands.add_parser("verify", help="measure a run's winner and baseline again: does the gain hold?"))
    check = commands.add_parser("check", help="explain a study without starting an engine")
    _add_study(check)
    check.add_argument("--json", action="store_true")
    _add_bench(commands.add_parser("bench", help="measure one setting by hand, as a trial is, without a search"))
    _add_logs(commands.add_parser("logs", help="read the logs of a study or of one trial"))
    status = commands.add_parser("status", help="where a study stands, also while it runs elsewhere")
    status.add_argument("results", type=_place, metavar="RESULTS")
    status.add_argument("-f", "--follow", action="store_true", help="the live table, until the study ends")
    status.add_argument("--json", action="store_true")
    report = commands.add_parser("report", help="write report.html again, also for a study that runs or was killed")
    report.add_argument("results", type=_place, metavar="RESULTS")
    _add_compare(commands.add_parser("compare", help="several studies side by side: what differs, what each came to"))
    _add_export(commands.add_parser("export", help="the winner, or any trial, for where it is served"))
    commands.add_parser("schema", help="the study file as a JSON schema, for editors")
    diagnose = commands.add_parser("diagnose", help="why an engine failed, read from its log")
    diagnose.add_argument("log", type=Path, metavar="ENGINE_LOG", help="a file, or - for standard input")
    diagnose.add_argument("--exit-code", type=int, help="of the engine, negative or above 128 for a signal")
    diagnose.add_argument("--json", action="store_true")
    clean = commands.add_parser("clean", help="end what a crash left running; say what old results weigh")
    clean.add_argument("--results", type=_place, default=Path(DEFAULT_RESULTS), metavar="PLACE")
    clean.add_argument("--json", action="store_true")
    completion = commands.add_parser("completion", help="what makes Tab complete commands, options and files")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    for name in commands.choices.keys() & PAGES.keys():
        _teach(commands.choices[name], PAGES[name], program)
    return parser


def _teach(command: argparse.ArgumentParser, page: Page, program: str) -> None:
    """Put the manual's words into a command's `--help`."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.description = textwrap.fill(page.about, 100)
    command.epilog = below_options(page, program)
    for action in command._actions:
        action.help = action.help or ARGUMENTS.get(str(action.metavar), ARGUMENTS.get(action.dest))


def _add_study(command: argparse.ArgumentParser) -> None:
    command.add_argument("study", type=Path, metavar="STUDY.yaml")
    _add_changes(command)
    command.add_argument("--trials", type=int, metavar="N", help="same as --set search.trials=N")


def _add_changes(command: argparse.ArgumentParser) -> None:
    where = "parent of runs' folders: a folder, or a URI of s3, gs or file; default: results"
    command.add_argument("--results", type=_place, metavar="PLACE", help=where)
    command.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a study's key")


def _add_run(run: argparse.ArgumentParser) -> None:
    _add_study(run)
    _add_how_to_run(run, "the study's newest unfinished run")


def _add_verify(verify: argparse.ArgumentParser) -> None:
    verify.add_argument("earlier", type=_place, metavar="RESULTS", help="folder of the earlier run; it is only read")
    verify.add_argument("--trial", type=int, metavar="N", help="another setting than the winner")
    verify.add_argument("--restarts", type=int, metavar="N", help="engine starts of each setting; default: the study's")
    verify.add_argument(
        "--results", type=_place, metavar="PLACE", help="parent of the new folder; default: beside RESULTS"
    )
    verify.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="model, engine, load, ...")
    _add_how_to_run(verify, "the newest unfinished one that verifies the same")


def _add_how_to_run(command: argparse.ArgumentParser, resumed: str) -> None:
    command.add_argument("--address", metavar="A", help="same as --set ray.address=A; default: Ray is started here")
    command.add_argument("--resume", action="store_true", help=f"go on with {resumed}")
    command.add_argument("-v", "--verbose", action="store_true")


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("study", type=Path, nargs="?", metavar="STUDY.yaml")
    _add_changes(bench)
    setting = "a parameter of the setting, in the search space or not; without any the baseline is measured"
    bench.add_argument("--param", action="append", default=[], metavar="NAME=VALUE", help=setting)
    again = "repeat this trial's setting; its run's study is used where no STUDY.yaml is named"
    bench.add_argument("--trial", nargs=2, metavar=("RESULTS", "N"), help=again)
    bench.add_argument("--json", action="store_true")


def _add_init(init: argparse.ArgumentParser) -> None:
    init.add_argument("model", metavar="MODEL", help="a hub id, a folder, or bundled:smollm2-135m-instruct")
    traffic = (
        "tokens of prompts and answers: D(in,out), N(mean,sd)/(mean,sd), U(min,max)/(min,max); default: a stand-in"
    )
    init.add_argument("--traffic", metavar="T", help=traffic)
    slo = "a promise, in milliseconds: ttft_ms.p90=500; may be given several times (latencies: docs/metrics.md)"
    init.add_argument("--slo", action="append", default=[], metavar="METRIC.STAT=MS", help=slo)
    init.add_argument("--minutes", type=float, metavar="N", help="for everything, verification included")
    init.add_argument("--python", type=Path, metavar="PATH", help="the Python that has vLLM in it; default: this one")
    init.add_argument("--output", type=Path, metavar="FILE", help="a new file; default: standard output")
    init.add_argument("--address", metavar="A", help="of a running Ray cluster, whose nodes the study is to fit")
    results = "where runs leave their folders: earlier ones of the model tell how long a trial takes"
    init.add_argument("--results", type=_place, default=Path(DEFAULT_RESULTS), metavar="PLACE", help=results)


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("results", type=_place, nargs="+", metavar="RESULTS")
    compare.add_argument("--output", type=Path, metavar="FILE", help="write a page with charts, too")
    compare.add_argument("--json", action="store_true")


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument("results", type=_place, metavar="RESULTS")
    export.add_argument("--trial", type=int, metavar="N", help="another setting than the winner")
    form = "launch line, vLLM's --config file, docker run, Compose file, Kubernetes Deployment and Service"
    export.add_argument("--format", choices=_FORMS, default="vllm", help=form)
    export.add_argument("--image", metavar="NAME:TAG", help="container image; default: vLLM's own, as was measured")


def _add_logs(logs: argparse.ArgumentParser) -> None:
    logs.add_argument("results", type=_place, metavar="RESULTS")
    logs.add_argument("trial", type=int, nargs="?", metavar="TRIAL")
    logs.add_argument("--engine", action="store_true", help="the engine's own log")
    logs.add_argument("--load", action="store_true", help="the load client's log")
    logs.add_argument("-f", "--follow", action="store_true")
    logs.add_argument("--since", metavar="TIME", help="ISO time, or an age such as 10m")
