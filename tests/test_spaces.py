"""Search spaces that come along, and how a study takes one over."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune_autotuner.engine.flags import flag, is_flag
from raytune_autotuner.engine.vllm_checker import VllmChecker
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.file import load_study
from raytune_autotuner.study.spaces import FOLDER, shipped
from raytune_autotuner.study.study import Study

BARE: dict[str, Any] = {"study": "test", "model": "org/name", "engine": {"args": {"max-model-len": 2048}}}


def load(folder: Path, **keys: Any) -> Study:
    """A study of a file with `keys` over the bare one."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(BARE | keys))
    return load_study(path)


def own_space(folder: Path, **content: Any) -> str:
    """The path of a space file of the user's own."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_space_makes_a_study(name: str, tmp_path: Path, root: Path) -> None:
    study = load(tmp_path, space=name)
    assert "max-num-seqs" in study.space.by_name
    assert study.space.constraints
    assert root / "configs" / "spaces" == FOLDER


def test_the_two_spaces_of_the_docs_are_shipped(root: Path) -> None:
    assert shipped() == ["vllm-cpu", "vllm-gpu"]
    page = (root / "docs" / "spaces.md").read_text(encoding="utf-8")
    assert [name for name in shipped() if f"`{name}`" not in page] == []


@pytest.mark.parametrize("name", shipped())
def test_every_parameter_of_a_shipped_space_is_explained(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if line.startswith("  ") and line[2:3].isalpha():
            assert lines[number - 1].startswith("  # "), f"{name}: {line}"


def test_the_studys_own_word_goes_first(tmp_path: Path) -> None:
    space = {"max-num-seqs": {"choice": [1, 2]}, "block-size": None, "seed": {"choice": [1, 2]}}
    study = load(tmp_path, space="vllm-cpu", search_space=space)
    assert study.space.by_name["max-num-seqs"].bounds == [1, 2]
    assert "block-size" not in study.space.by_name
    assert "seed" in study.space.by_name


def test_what_the_study_fixes_is_not_searched(tmp_path: Path) -> None:
    engine = {"args": {"enable-chunked-prefill": True}, "env": {"VLLM_CPU_KVCACHE_SPACE": 2}}
    study = load(tmp_path, space="vllm-cpu", engine=engine)
    assert not {"enable-chunked-prefill", "env:VLLM_CPU_KVCACHE_SPACE"} & set(study.space.by_name)
    both = load(tmp_path, space="vllm-cpu", engine=engine, search_space={"enable-chunked-prefill": "bool"})
    assert "enable-chunked-prefill" in both.space.by_name, "the study asks for it itself"


def test_conditions_on_what_is_left_out_are_left_out_too(tmp_path: Path) -> None:
    texts = [constraint.text for constraint in load(tmp_path, space="vllm-cpu").space.constraints]
    assert texts == [
        "max-num-batched-tokens >= max-num-seqs",
        "enable-chunked-prefill or max-num-batched-tokens >= max-model-len",
    ]
    fewer = load(tmp_path, space="vllm-cpu", engine={}, search_space={"env:VLLM_CPU_OMP_THREADS_BIND": None})
    assert [constraint.text for constraint in fewer.space.constraints] == texts[:1], "max-model-len is not known"
    assert "env:VLLM_CPU_NUM_OF_RESERVED_CPU" not in fewer.space.by_name


def test_own_constraints_come_beside_those_of_the_space(tmp_path: Path) -> None:
    study = load(tmp_path, space="vllm-gpu", constraints=["max-num-seqs < 512"])
    assert [c.text for c in study.space.constraints] == ["max-num-batched-tokens >= max-num-seqs", "max-num-seqs < 512"]


def test_a_study_is_written_out_so_that_it_stands_alone(tmp_path: Path) -> None:
    study = load(tmp_path, space="vllm-cpu")
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(study.model_dump(mode="json", exclude_defaults=True)))
    assert load_study(again) == study
    assert "space" not in study.model_dump()


def test_a_file_of_ones_own_is_taken_as_well(tmp_path: Path) -> None:
    path = own_space(tmp_path, search_space={"seed": {"choice": [1, 2]}}, constraints=["seed > 0"])
    assert list(load(tmp_path, space=path).space.by_name) == ["seed"]
    assert list(load(tmp_path, space=None, search_space={"seed": "bool"}).space.by_name) == ["seed"]


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ("vllm-tpu", r"'vllm-tpu' is neither a file nor shipped; shipped: vllm-cpu, vllm-gpu"),
        (3, "takes a name or a file, but got 3"),
        ("{folder}/no.yaml", "neither a file nor shipped"),
    ],
)
def test_a_space_that_is_not_there_is_told_with_those_that_are(tmp_path: Path, space: Any, told: str) -> None:
    name = space.format(folder=tmp_path) if isinstance(space, str) else space
    with pytest.raises(ConfigError, match=told):
        load(tmp_path, space=name)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"search_space": []},
        {"search_space": {}, "search": {}},
        {"search_space": {"seed": "bool"}, "constraints": 1},
    ],
    ids=str,
)
def test_a_file_that_holds_no_space_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load(tmp_path, space=own_space(tmp_path, **content))


@pytest.mark.vllm
def test_the_installed_vllm_knows_every_flag_and_value_of_the_shipped_spaces(tmp_path: Path) -> None:
    values = [
        (parameter.name, value)
        for name in shipped()
        for parameter in load(tmp_path, space=name).space.parameters
        for value in parameter.bounds
    ]
    given = [[name, value, flag(name, value) if is_flag(name) else []] for name, value in values]
    with VllmChecker(sys.executable, {}) as checker:
        answer = checker.examine({"model": str(tmp_path), "args": [], "candidates": given})
    assert answer["unknown"] == {}
    assert answer["rejected"] == []


def test_a_condition_on_what_is_left_out_for_its_own_condition_is_left_out_too(tmp_path: Path) -> None:
    chain = {"c": "bool", "b": {"bool": True, "when": "c"}, "a": {"bool": True, "when": "b"}}
    path = own_space(tmp_path, search_space=chain, constraints=["not a or b"])
    study = load(tmp_path, space=path, search_space={"c": None, "z": "bool"})
    assert (list(study.space.by_name), study.constraints) == (["z"], ())
