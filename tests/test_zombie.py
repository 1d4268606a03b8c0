"""The zombie as it happened: a trial overruns its deadline and keeps printing while the next one runs."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from raytune_autotuner.report.results import ResultsFolder
from tests.studies import command, marks, only_run, write_study
from tests.test_study_run import wait_for

pytestmark = pytest.mark.slow

LIMIT_MB = 0.05
TEXT = "zombie-of-trial-1"
# Two printers that SIGTERM and the engine's end do not stop, and an engine that does not get ready in time.
ZOMBIE = f"leak@initialization:every=0.004:text={TEXT}:tree=stubborn+daemon,slow-start@compilation:seconds=60"
STAGED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z \[[a-z-]+\] .")
NAMED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (trial \d+|study) .")


@dataclass
class Seen:
    """A finished study, and what was followed while it ran."""

    folder: ResultsFolder
    study_followed: str
    trial_followed: str

    def dir(self, number: int) -> Path:
        return self.folder.find_trial_dir(number)


def logs(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "raytune_autotuner", "logs", str(folder), *options]


def read(seen: Seen, *options: str) -> str:
    return subprocess.run(logs(seen.folder.path, *options), capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Seen:
    study = write_study(
        tmp_path_factory.mktemp("zombie"),
        engine={"args": {"fault": "none"}},
        search_space={"fault": {"choice": ["none", ZOMBIE]}, "max-num-seqs": {"choice": [8, 64]}},
        search={"trials": 3, "points": [{"fault": ZOMBIE}, {"max-num-seqs": 8}]},
        trial={"timeout_s": 5, "hung_after_s": 5, "log_limit_mb": LIMIT_MB},
        resources={"max_concurrent": 1},
    )
    with subprocess.Popen(command(study, "--address", ray_address), stdout=subprocess.PIPE, text=True) as driver:
        wait_for(lambda: list(study.parent.glob("results/*/trials/0-*/engine.log")))
        folder = only_run(study)
        following = [
            subprocess.Popen(logs(folder.path, *options, "--follow"), stdout=subprocess.PIPE, text=True)
            for options in ((), ("0", "--engine"))
        ]
        said, _ = driver.communicate(timeout=120)
    followed = [process.communicate(timeout=30)[0] for process in following]
    assert driver.returncode == 0, said
    return Seen(folder, *followed)


def test_the_trial_that_overran_is_ended_and_the_next_one_measured(seen: Seen) -> None:
    rows = seen.folder.read_rows()
    assert [str(row.state) for row in rows] == ["measured", "failed", "measured"]
    failure = rows[1].result.failure
    assert failure is not None
    assert (str(failure.stage), str(failure.kind)) == ("compilation", "deadline")
    assert marks(seen.folder.path.name) == {}


def test_the_files_of_the_next_trial_hold_nothing_of_it(seen: Seen) -> None:
    assert TEXT in (seen.dir(1) / "engine.log").read_text()
    for number in (0, 2):
        for file in seen.dir(number).iterdir():
            assert TEXT.encode() not in file.read_bytes(), file


def test_every_line_of_a_trials_logs_has_a_time_stamp_and_a_stage(seen: Seen) -> None:
    files = [file for number in range(3) for file in seen.dir(number).glob("*.log")]
    assert {"trial.log", "engine.log", "load.log", "engine.tail.log"} <= {file.name for file in files}
    for file in files:
        for line in file.read_text().splitlines():
            assert STAGED.match(line), f"{file.name}: {line}"


def test_every_line_of_the_studys_log_names_the_trial(seen: Seen) -> None:
    lines = seen.folder.study_log.read_text().splitlines()
    assert all(NAMED.match(line) for line in lines), lines
    assert {"trial 0", "trial 1", "trial 2", "study"} == {m[1] for line in lines if (m := NAMED.match(line))}


def test_a_log_beyond_its_limit_keeps_its_head_and_its_tail(seen: Seen) -> None:
    parts = list(seen.dir(1).glob("engine*.log"))
    assert sum(file.stat().st_size for file in parts) <= LIMIT_MB * 1e6 * 1.02
    shown = read(seen, "1", "--engine").splitlines()
    head = (seen.dir(1) / "engine.log").read_text().splitlines()
    tail = (seen.dir(1) / "engine.tail.log").read_text().splitlines()
    assert shown[: len(head)] == head
    assert shown[-len(tail) :] == tail
    assert tail[-1] > head[-1]  # by their time stamps


def test_following_gives_history_first_and_then_every_line_once(seen: Seen) -> None:
    assert seen.study_followed == read(seen)
    assert seen.trial_followed == read(seen, "0", "--engine")
    assert seen.study_followed.count("trial 2 started") == 1


def test_each_of_a_trials_logs_is_read_by_its_option(seen: Seen) -> None:
    assert "measured in" in read(seen, "2")
    assert "requests, 0 failed" in read(seen, "2", "--load")
    assert "Application startup complete" in read(seen, "2", "--engine")


def test_since_leaves_out_what_was_before(seen: Seen) -> None:
    lines = read(seen, "2").splitlines()
    middle = lines[len(lines) // 2].split(" ")[0]
    since = read(seen, "2", "--since", middle).splitlines()
    assert since == [line for line in lines if line >= middle]
    assert 0 < len(since) < len(lines)
    assert read(seen, "2", "--since", "0s") == ""
    assert read(seen, "2", "--since", "1h").splitlines() == lines
