"""Commands that begin with a study: to write one, to explain it, to run it, or one setting of it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raytune_autotuner.cli.command import DEFAULT_RESULTS, PROGRAM, Command, place
from raytune_autotuner.study.errors import OK, ConfigError

if TYPE_CHECKING:
    from raytune_autotuner.report.store import Store
    from raytune_autotuner.study.study import Study


def _add_run(run: argparse.ArgumentParser) -> None:
    _add_study(run)
    _add_how_to_run(run, "the study's newest unfinished run")


def _run(arguments: argparse.Namespace) -> int:
    study = _load(arguments, _address(arguments))
    from raytune_autotuner.tune.run import run_study

    return run_study(study, _results(arguments, study), resume=arguments.resume, verbose=arguments.verbose)


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
    init.add_argument("--results", type=place, default=Path(DEFAULT_RESULTS), metavar="PLACE", help=results)


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
    print(summary(proposal, f"{PROGRAM} {shlex.quote(str(output or 'STUDY.yaml'))}"), file=sys.stderr)
    return OK


def _write(path: Path, text: str) -> None:
    """Write a new file; raises `ConfigError` where that cannot be."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror or error}.") from error


def _add_verify(verify: argparse.ArgumentParser) -> None:
    verify.add_argument("earlier", type=place, metavar="RESULTS", help="folder of the earlier run; it is only read")
    verify.add_argument("--trial", type=int, metavar="N", help="another setting than the winner")
    verify.add_argument("--restarts", type=int, metavar="N", help="engine starts of each setting; default: the study's")
    verify.add_argument(
        "--results", type=place, metavar="PLACE", help="parent of the new folder; default: beside RESULTS"
    )
    verify.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="model, engine, load, ...")
    _add_how_to_run(verify, "the newest unfinished one that verifies the same")


def _verify(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.report.runs import open_run
    from raytune_autotuner.tune.run import run_study
    from raytune_autotuner.tune.verify import study_to_verify

    earlier = open_run(arguments.earlier, trials="")
    overrides = [*arguments.set, *_address(arguments)]
    study, verifies = study_to_verify(earlier, arguments.trial, arguments.restarts, overrides)
    results = arguments.results or earlier.parent
    return run_study(study, results, resume=arguments.resume, verbose=arguments.verbose, verifies=verifies)


def _add_check(check: argparse.ArgumentParser) -> None:
    _add_study(check)
    check.add_argument("--json", action="store_true")


def _check(arguments: argparse.Namespace) -> int:
    study = _load(arguments)
    from raytune_autotuner.tune.explain import explain, render

    explained = explain(study, _results(arguments, study))
    print(json.dumps(explained.to_dict()) if arguments.json else render(explained))
    return OK


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("study", type=Path, nargs="?", metavar="STUDY.yaml")
    _add_changes(bench)
    setting = "a parameter of the setting, in the search space or not; without any the baseline is measured"
    bench.add_argument("--param", action="append", default=[], metavar="NAME=VALUE", help=setting)
    again = "repeat this trial's setting; its run's study is used where no STUDY.yaml is named"
    bench.add_argument("--trial", nargs=2, metavar=("RESULTS", "N"), help=again)
    bench.add_argument("--json", action="store_true")


def _bench(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.study.file import read_params
    from raytune_autotuner.tune.bench import Start, earlier_setting, run_bench

    if arguments.trial is not None:
        start = earlier_setting(*arguments.trial)
    elif arguments.study is not None:
        start = Start(arguments.study)
    else:
        raise ConfigError(f"bench needs a study file, or a trial to repeat: {PROGRAM} bench --trial RESULTS N")
    study = _load_study(arguments.study or start.study_file, arguments.set)
    params = {**start.params, **read_params(arguments.param)}
    return run_bench(study, params, _results(arguments, study), restart=start.restart, as_json=arguments.json)


def _schema(arguments: argparse.Namespace) -> int:
    from raytune_autotuner.study.schema import json_schema

    print(json.dumps(json_schema(), indent=1))
    return OK


def _add_study(command: argparse.ArgumentParser) -> None:
    command.add_argument("study", type=Path, metavar="STUDY.yaml")
    _add_changes(command)
    command.add_argument("--trials", type=int, metavar="N", help="same as --set search.trials=N")


def _add_changes(command: argparse.ArgumentParser) -> None:
    where = "parent of runs' folders: a folder, or a URI of s3, gs or file; default: results"
    command.add_argument("--results", type=place, metavar="PLACE", help=where)
    command.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a study's key")


def _add_how_to_run(command: argparse.ArgumentParser, resumed: str) -> None:
    command.add_argument("--address", metavar="A", help="same as --set ray.address=A; default: Ray is started here")
    command.add_argument("--resume", action="store_true", help=f"go on with {resumed}")
    command.add_argument("-v", "--verbose", action="store_true")


def _address(arguments: argparse.Namespace) -> list[str]:
    """`--address` as an override of the study."""
    return [] if arguments.address is None else [f"ray.address={json.dumps(arguments.address)}"]


def _load(arguments: argparse.Namespace, more: Sequence[str] = ()) -> Study:
    """The study that a command line names, with its overrides and `more` of them."""
    trials = [] if arguments.trials is None else [f"search.trials={arguments.trials}"]
    return _load_study(arguments.study, [*arguments.set, *trials, *more])


def _load_study(file: Path, overrides: Sequence[str]) -> Study:
    from raytune_autotuner.engine import models
    from raytune_autotuner.study.file import load_study

    study = load_study(file, overrides)
    return study.model_copy(update={"model": models.absolute(study.model, study.engine.kind)})


def _results(arguments: argparse.Namespace, study: Study) -> Path | Store:
    """Where the study's runs lie: as the command line says, or the study, or in `results`."""
    from raytune_autotuner.report.store import place

    return arguments.results or place(study.results or DEFAULT_RESULTS, in_study=True)


COMMANDS = (
    Command("run", "run a study; the word `run` may be left out", _add_run, _run),
    Command("init", "write a study for a model that fits this machine, ready to run", _add_init, _init),
    Command("verify", "measure a run's winner and baseline again: does the gain hold?", _add_verify, _verify),
    Command("check", "explain a study without starting an engine", _add_check, _check),
    Command("bench", "measure one setting by hand, as a trial is, without a search", _add_bench, _bench),
    Command("schema", "the study file as a JSON schema, for editors", lambda schema: None, _schema),
)
