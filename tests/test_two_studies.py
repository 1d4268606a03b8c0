"""Two studies on one machine at once; what ends one of them is nothing to the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from raytune_autotuner.engine.processes import MARK_VARIABLE, Process, make_mark
from raytune_autotuner.report.results import ResultsFolder
from tests.studies import command, marks, only_run, write_study
from tests.test_study_run import SLOW, actor_under_load, wait_for

pytestmark = pytest.mark.slow


def start(study: Path, *options: str) -> subprocess.Popen[str]:
    """The study's driver, in a session of its own as below a terminal."""
    arguments = command(study, *options)
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def write(folder: Path, trials: int) -> Path:
    folder.mkdir(parents=True)
    resources = {"cpus": 0.5, "max_concurrent": 1}
    return write_study(folder, study=folder.name, workload=SLOW, search={"trials": trials}, resources=resources)


def clean(results: Path, *options: str) -> str:
    arguments = [sys.executable, "-m", "raytune_autotuner", "clean", "--results", str(results), *options]
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout


@contextmanager
def orphan() -> Iterator[subprocess.Popen[bytes]]:
    """What a crash has left: a process with a trial's mark whose owner is dead."""
    owner = subprocess.Popen(["true"])
    mark = make_mark("crashed", "0", Process.of(owner.pid))
    owner.wait()
    with subprocess.Popen(["sleep", "60"], env={MARK_VARIABLE: mark}) as process:
        yield process
        process.kill()


def engines(study: Path) -> list[int]:
    """The processes of its trials."""
    return [pid for folder in ResultsFolder.runs(study.parent / "results") for pid in marks(folder.path.name)]


def ports(folder: ResultsFolder) -> set[str]:
    """The ports of a study's engines."""
    commands = [json.loads(file.read_text())["argv"] for file in folder.trials_dir.glob("*/command.json")]
    return {argv[argv.index("--port") + 1] for argv in commands}


def test_ctrl_c_and_clean_up_of_one_study_leave_the_other_alone(
    tmp_path: Path,
) -> None:
    studies = [write(tmp_path / name, trials) for name, trials in (("ended", 9), ("other", 3))]
    ended, other = studies
    with ExitStack() as stack:
        drivers = [stack.enter_context(start(study)) for study in studies]
        wait_for(lambda: all(engines(study) for study in studies))
        with orphan() as left_over:
            answer = json.loads(clean(tmp_path / "other" / "results", "--json"))
            assert answer["ended"] == [left_over.pid]
        assert list(answer["results"]) == [str(only_run(other).path)]
        os.killpg(drivers[0].pid, signal.SIGINT)
        said = [driver.communicate(timeout=120)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [130, 0], said
    assert "Interrupted" in said[0]
    assert [str(row.state) for row in only_run(other).read_rows()] == ["measured"] * 3
    assert ports(only_run(ended)).isdisjoint(ports(only_run(other)))
    assert "0 left-over processes ended" in clean(tmp_path / "other" / "results")
    assert "MB  in 1 runs" in clean(tmp_path / "other" / "results")


def test_two_studies_of_one_name_on_one_ray_keep_their_files_apart(tmp_path: Path, ray_address: str) -> None:
    studies = [write(tmp_path / name / "same", 1) for name in ("first", "second")]
    with ExitStack() as stack:
        drivers = [stack.enter_context(start(study, "--address", ray_address)) for study in studies]
        said = [driver.communicate(timeout=120)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], said
    for study in studies:
        folder = only_run(study)
        (row,) = folder.read_rows()
        assert [entry.name for entry in folder.trials_dir.iterdir() if entry.is_dir()] == [f"0-{row.trial_id}"]
    assert marks(only_run(studies[0]).path.name) == {}


def test_ctrl_c_twice_ends_at_once_and_leaves_nothing(tmp_path: Path, ray_address: str) -> None:
    study = write(tmp_path / "study", 9)
    with start(study, "--address", ray_address) as driver:
        actor_under_load(study, 0)
        run_id = only_run(study).path.name
        for _ in range(2):
            os.killpg(driver.pid, signal.SIGINT)
            time.sleep(0.02)
        driver.communicate(timeout=60)
    assert driver.returncode == 130
    wait_for(lambda: not marks(run_id), timeout_s=20)
