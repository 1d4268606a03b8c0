from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from raytune_autotuner.engine.logfile import StampedLog, log_parts
from raytune_autotuner.report.logs import LogWriter, follow_lines, parse_since, read_log, stamp
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.status import StudyStatus, write_status
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Stage
from tests.report_samples import make_study

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z .*")


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    made = ResultsFolder.create(tmp_path, make_study())
    for number in (0, 3):
        made.trial_dir(number, f"x_{number}").mkdir()
    return made


def write(path: Path, *texts: str) -> None:
    with LogWriter(path) as log:
        for text in texts:
            log.write(Stage.LOAD, text)


def words(lines: Iterator[str] | list[str]) -> list[str]:
    """The last word of each line."""
    return [line.split()[-1] for line in lines]


# Writing


def test_each_line_has_time_and_stage(tmp_path: Path) -> None:
    write(tmp_path / "trial.log", "one", "two\nthree")
    lines = (tmp_path / "trial.log").read_text().splitlines()
    assert all(LINE.fullmatch(line) for line in lines)
    assert [line.split(" ", 1)[1] for line in lines] == ["[load] one", "[load] two", "[load] three"]


def test_the_aggregate_log_names_the_trial_on_each_line(tmp_path: Path) -> None:
    with LogWriter(tmp_path / "study.log") as log:
        log.write(Stage.WEIGHTS, "loading", trial=3)
        log.write(None, "started", trial=4)
        log.write_study("begins")
    lines = [line.split(" ", 1)[1] for line in (tmp_path / "study.log").read_text().splitlines()]
    assert lines == ["trial 3 [weights] loading", "trial 4 started", "study begins"]


def test_a_secret_does_not_reach_the_log(tmp_path: Path) -> None:
    write(tmp_path / "trial.log", "with HF_TOKEN=abcdef and hf_0123456789")
    assert (tmp_path / "trial.log").read_text().endswith("with HF_TOKEN=*** and ***\n")


def test_text_that_no_encoding_takes_is_written_all_the_same(tmp_path: Path) -> None:
    write(tmp_path / "trial.log", "half \ud800", "")
    assert words(["x " + line for line in (tmp_path / "trial.log").read_text().splitlines()]) == ["?", "[load]"]


def test_processes_that_share_a_log_do_not_tear_each_others_lines(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    script = (
        "import sys\nfrom pathlib import Path\nfrom raytune_autotuner.report.logs import LogWriter\n"
        f"log = LogWriter(Path({str(path)!r}))\n"
        "for i in range(300): log.write(None, sys.argv[1] * 200, trial=i)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, letter]) for letter in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    lines = path.read_text().splitlines()
    assert len(lines) == 600
    assert {line.split()[-1] for line in lines} == {"a" * 200, "b" * 200}


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a" / "trial.log")
    log.close()
    log.close()


# Reading


def test_the_study_or_one_of_a_trials_logs_is_read(folder: ResultsFolder) -> None:
    write(folder.study_log, "of-the-study")
    for name in ("trial", "engine", "load"):
        write(folder.find_trial_dir(3) / f"{name}.log", f"of-the-{name}")
    assert words(read_log(folder)) == ["of-the-study"]
    assert words(read_log(folder, 3)) == ["of-the-trial"]
    assert words(read_log(folder, 3, "engine")) == ["of-the-engine"]
    assert words(read_log(folder, 3, "load")) == ["of-the-load"]


def test_the_logs_of_an_engines_ranks_are_read_as_one_and_each_line_says_whose_it_is(folder: ResultsFolder) -> None:
    noon = datetime(2026, 11, 23, 12, tzinfo=UTC)
    place = folder.find_trial_dir(3)
    for rank, name in enumerate(("engine.log", "engine-1.log", "engine-10.log")):
        lines = [f"{stamp(noon + timedelta(seconds=10 * second + rank))} [load] at {second}" for second in (0, 1)]
        (place / name).write_text("\n".join([lines[0], "goes on", lines[1]]) + "\n")
    (place / "engine-1.tail.log").write_text(f"{stamp(noon + timedelta(minutes=1))} [load] the tail\n")
    said = [line.removeprefix("2026-11-23T") for line in read_log(folder, 3, "engine")]
    assert said[:4] == [
        "12:00:00.000Z rank 0 [load] at 0", "rank 0 goes on", "12:00:01.000Z rank 1 [load] at 0", "rank 1 goes on",
    ]  # fmt: skip
    assert said[-2:] == ["12:00:12.000Z rank 10 [load] at 1", "12:01:00.000Z rank 1 [load] the tail"]
    assert len(said) == 10
    assert words(read_log(folder, 3, "engine", since="2026-11-23T12:01")) == ["tail"]


def test_what_is_not_there_is_said(folder: ResultsFolder) -> None:
    write(folder.find_trial_dir(3) / "trial.log", "x")
    with pytest.raises(ConfigError, match=r"load.log: there is no such log \(yet\). There: trial.log"):
        read_log(folder, 3, "load")
    with pytest.raises(ConfigError, match=r"no trial 7. It has trials 0 to 3"):
        read_log(folder, 7)
    with pytest.raises(ConfigError, match="--engine is a trial's log"):
        read_log(folder, None, "engine")


def test_a_secret_in_an_engines_log_is_not_shown(folder: ResultsFolder) -> None:
    (folder.find_trial_dir(3) / "engine.log").write_text("raw line with hf_0123456789abc\n")
    assert list(read_log(folder, 3, "engine")) == ["raw line with ***"]


def test_a_line_that_has_no_end_yet_is_read_too(folder: ResultsFolder) -> None:
    (folder.find_trial_dir(3) / "engine.log").write_bytes(b"one\r\ntwo \xff")
    assert list(read_log(folder, 3, "engine")) == ["one", "two \ufffd"]


def test_a_log_that_outgrew_its_limit_is_read_head_first_then_tail(folder: ResultsFolder) -> None:
    path = folder.find_trial_dir(3) / "engine.log"
    log = StampedLog(path, 4000)
    for number in range(300):
        log.write([("load", f"line {number}")])
    log.close()
    assert len(log_parts(path)) == 3
    numbers = [int(line.rsplit(" ", 1)[1]) for line in read_log(folder, 3, "engine") if " line " in line]
    assert numbers[0] == 0
    assert numbers[-1] == 299
    assert numbers == sorted(set(numbers))


def test_since_leaves_out_what_was_before(folder: ResultsFolder) -> None:
    noon = datetime(2026, 11, 23, 12, tzinfo=UTC)
    lines = [f"{stamp(noon + timedelta(minutes=minute))} [load] {minute}" for minute in range(5)]
    lines.insert(4, "goes-with-3")
    folder.study_log.write_text("\n".join(["before-any-stamp", *lines]) + "\n")
    assert words(read_log(folder, since=noon + timedelta(minutes=3))) == ["3", "goes-with-3", "4"]
    assert words(read_log(folder, since="2026-11-23T12:04")) == ["4"]
    assert words(read_log(folder, since="2026-11-23T13:04+01:00")) == ["4"]


def test_a_point_in_time_is_an_age_or_iso_text() -> None:
    now = datetime(2026, 11, 23, 12, tzinfo=UTC)
    assert parse_since("10m", now) == now - timedelta(minutes=10)
    assert parse_since("1.5 h", now) == now - timedelta(minutes=90)
    assert parse_since("2026-11-23T12:00:00Z") == now
    assert stamp(now) == "2026-11-23T12:00:00.000Z"
    for wrong in ("yesterday", "", "10", "10x"):
        with pytest.raises(ConfigError, match="--since"):
            parse_since(wrong)


# Following


class Follower:
    """Follows a log in a thread of its own."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._run, args=(lines,))
        self._thread.start()

    def _run(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.lines.append(line)

    def wait_for(self, reached: Callable[[list[str]], bool], timeout_s: float = 20.0) -> None:
        end = time.monotonic() + timeout_s
        while not reached(self.lines) and time.monotonic() < end:
            time.sleep(0.02)
        assert reached(self.lines), self.lines[-5:]

    def join(self) -> list[str]:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.lines


def test_following_gives_history_then_what_comes_and_ends_with_the_study(folder: ResultsFolder) -> None:
    status = StudyStatus.begin(1)
    write_status(folder, status)
    write(folder.study_log, "one")
    follower = Follower(read_log(folder, follow=True))
    follower.wait_for(lambda lines: len(lines) == 1)
    write(folder.study_log, "two")
    follower.wait_for(lambda lines: len(lines) == 2)
    with folder.study_log.open("a") as file:
        file.write("thr")
        file.flush()
        time.sleep(0.5)  # a line that is being written is not shown in pieces
        assert len(follower.lines) == 2
        file.write("ee\nfo")
    write_status(folder, replace(status, phase="finished"))
    assert words(follower.join()) == ["one", "two", "three", "fo"]


def test_following_ends_when_the_driver_was_killed(folder: ResultsFolder) -> None:
    driver = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    write(folder.study_log, "one")
    fields = Path(f"/proc/{driver.pid}/stat").read_text().rpartition(")")[2].split()
    write_status(folder, replace(StudyStatus.begin(1), pid=driver.pid, pid_started=int(fields[19])))
    follower = Follower(read_log(folder, follow=True))
    follower.wait_for(lambda lines: len(lines) == 1)
    driver.kill()
    driver.wait()
    assert words(follower.join()) == ["one"]


def test_following_a_log_that_is_not_there_yet_waits_for_it(folder: ResultsFolder) -> None:
    status = StudyStatus.begin(1)
    write_status(folder, status)
    follower = Follower(read_log(folder, 0, "load", follow=True))
    time.sleep(0.3)
    write(folder.find_trial_dir(0) / "load.log", "one")
    follower.wait_for(lambda lines: len(lines) == 1)
    write_status(folder, replace(status, phase="finished"))
    assert words(follower.join()) == ["one"]


def test_following_through_turns_of_the_log_gives_every_line_once(tmp_path: Path) -> None:
    path, over = tmp_path / "engine.log", threading.Event()
    log = StampedLog(path, 4000)  # parts of 1000 bytes: about 25 lines
    follower = Follower(follow_lines(path, over.is_set))
    for number in range(140):
        log.write([("load", f"line {number}")])
        if number % 14 == 0:  # never two turns between two looks
            follower.wait_for(lambda lines, last=f" {number}": bool(lines) and lines[-1].endswith(last))  # type: ignore[misc]
    log.close()
    over.set()
    numbers = [int(line.rsplit(" ", 1)[1]) for line in follower.join() if " line " in line]
    assert numbers == list(range(140))


def test_following_leaves_no_file_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    write(tmp_path / "a.log", "one", "two")
    lines = follow_lines(tmp_path / "a.log", lambda: False)
    next(lines)
    del lines
    assert list(follow_lines(tmp_path / "a.log", lambda: True))
    assert len(os.listdir("/proc/self/fd")) == before
