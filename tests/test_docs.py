"""What the docs say is what the code has, and the reverse; every study in configs/ is a study."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import jsonschema
import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import raytune_autotuner
from raytune_autotuner.cli import main, manual
from raytune_autotuner.cli.program import COMMANDS, make_parser
from raytune_autotuner.engine import models
from raytune_autotuner.score.metrics import METRICS
from raytune_autotuner.study.failure import Blame, Kind, Stage
from raytune_autotuner.study.file import load_study
from raytune_autotuner.study.schema import json_schema
from raytune_autotuner.study.study import Grade, Study

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next((found for part in get_args(annotation) if (found := model_in(part))), None)
    return None


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a study that holds a value, dotted."""
    for name, field in model.model_fields.items():
        section = model_in(field.annotation)
        if section is None:
            yield prefix + name, field
        else:
            yield from keys(section, f"{prefix}{name}.")


def rows(page: str) -> Iterator[list[str]]:
    """The cells of the tables' rows, heads left out."""
    for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_what_is_made_from_the_code_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "reference", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_key_of_a_study_says_what_it_means() -> None:
    documented = {row[0].strip("`") for row in rows("study-file.md")}
    assert [key for key, field in keys(Study) if not field.description or key not in documented] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_schema_takes_every_study_in_configs(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), json_schema())


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"serch": {}}, "serch"),
        ({"search": {"trials": "many"}}, "many"),
        ({"search_space": {"block-size": {"choise": [16]}}}, "choise"),
        ({"workload": {"concurrency": [0]}}, "0"),
    ],
)
def test_the_schema_refuses_what_a_study_cannot_have(changes: dict[str, Any], wrong: str) -> None:
    study = {"study": "s", "model": "m", "search_space": {"block-size": {"choice": [16]}}, **changes}
    with pytest.raises(jsonschema.ValidationError, match=wrong):
        jsonschema.validate(study, json_schema())


def test_every_metric_is_documented_and_no_other() -> None:
    assert {name for row in rows("metrics.md") for name in re.findall(r"`([^`]+)`", row[0])} == set(METRICS)


@pytest.mark.parametrize(
    ("heading", "names"),
    [("Stages", Stage), ("Kinds", Kind), ("Whose fault it was", Blame)],
    ids=lambda part: str(part),
)
def test_every_name_of_a_failure_is_documented_and_no_other(heading: str, names: type[StrEnum]) -> None:
    page = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([^`]+)`", section, re.MULTILINE) == list(names)


@pytest.mark.parametrize("stage", Stage)
def test_a_stages_documented_share_is_its_share(stage: Stage) -> None:
    told = next(row for row in rows("failures.md") if row[0] == f"`{stage}`")[1]
    low, *high = (float(number) for number in re.findall(r"\d\.\d\d", told))
    assert (low, *high[:1]) == tuple(dict.fromkeys((stage.progress(0), stage.progress(1))))


def test_every_grade_is_explained() -> None:
    page = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    assert re.findall(r"^\*\*`(\w+)`\*\*", page, re.MULTILINE) == list(get_args(Grade))


@pytest.mark.parametrize("row", [row for row in rows("metrics.md") if len(row) > 2], ids=lambda row: row[0])
def test_a_metrics_documented_unit_is_its_unit(row: list[str]) -> None:
    assert row[1] == METRICS[row[0].strip("`")].unit


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_study_in_configs_loads_and_its_model_can_be_one(path: Path) -> None:
    study = load_study(path)
    models.check(study.model)
    assert study.objective.metric in METRICS
    assert path.name in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_study_holds_what_the_quickstart_promises() -> None:
    study = load_study(ROOT / "configs" / "llama.yaml")
    assert study.search.trials >= 8
    assert "env:VLLM_CPU_OMP_THREADS_BIND" in study.space.by_name
    assert any(point["block-size"] % 32 for point in study.search.points), "the setting that fails on purpose is gone"


def test_every_command_stands_in_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert commands
    assert not [name for name in commands if name != "run" and f"python -m raytune_autotuner {name} " not in readme]


def test_every_command_has_its_page_of_the_manual_with_examples_that_it_takes() -> None:
    parser = make_parser()
    taken = set()
    for page in (manual.OVERVIEW, *manual.PAGES.values()):
        for example in page.examples:
            words = shlex.split(example.partition(" > ")[0])
            taken.add(parser.parse_args(words if words[0] in COMMANDS else ["run", *words]).command)
    assert taken == set(manual.PAGES) == set(COMMANDS)


def test_every_exit_code_is_documented_as_help_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    told = {int(row[0].strip("`")): row[1] for row in rows("watching.md") if row[0].strip("`").isdigit()}
    assert told == manual.EXIT_CODES
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    said = capsys.readouterr().out
    assert all(f"  {code:<4} {meaning}\n" in said for code, meaning in manual.PAGES["run"].codes.items())


def test_every_module_stands_in_the_house_and_no_other() -> None:
    package = Path(raytune_autotuner.__file__).parent
    house = (
        (ROOT / "docs" / "house.md").read_text(encoding="utf-8").split("The modules, in the order")[1].split("\n## ")[0]
    )
    told = {
        room: re.findall(r"`(\w+)`", names)
        for room, names in re.findall(r"- `([\w/]+)/`:((?:(?!\n- ).)*)", house, re.S)
    }
    assert told.keys() == {f.parent.relative_to(package).as_posix() for f in package.rglob("[a-z]*.py")}
    for room, names in told.items():
        assert sorted(names) == sorted(path.stem for path in (package / room).glob("[a-z]*.py")), room


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_between_the_pages_is_broken(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}, link
