"""A long study in which something goes wrong at random: what is done to each trial, and the accounts afterwards.

`run_soak` starts such a study, watches its driver from outside and looks for what is left; tests/test_soak.py and
scripts/bench/soak both stand on it. Run as a script, this is the study's driver: `soak_study.py STUDY.yaml --seed N`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil
from optuna.trial import TrialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from raytune_autotuner.engine.processes import FileLock, Process, is_free
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.study.file import load_study
from raytune_autotuner.study.trial import State, TrialRow
from raytune_autotuner.tune.evaluate import Evaluation
from raytune_autotuner.tune.run import run_study
from raytune_autotuner.tune.trainable import EngineTrial
from tests.kill_study import left_of, rays_of
from tests.studies import marks, only_run, optuna_trials, write_study

_SAMPLE_S = 0.5
_LONGEST_S = 2.5
"""How late in its life something is done to a trial, at most; a healthy one takes about as long."""
_FULL_BYTES = 2_000
"""A disk that is full is a limit on the size of files: what is larger cannot be written."""


@dataclass(frozen=True)
class Injury:
    """One thing that is done to a trial, and how the trial may then end."""

    name: str
    ends: frozenset[State]
    weight: int = 1
    fault: str = "none"
    """Of the simulated engine."""
    act: Callable[[Evaluation, float], None] = lambda evaluation, after_s: None
    """What is done in the trial's actor; seconds after its beginning."""


def _later(after_s: float, act: Callable[[], None]) -> None:
    timer = threading.Timer(after_s, act)
    timer.daemon = True
    timer.start()


def _kill_actor(evaluation: Evaluation, after_s: float) -> None:
    _later(after_s, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _kill_supervisor(evaluation: Evaluation, after_s: float) -> None:
    def act() -> None:
        os.kill(json.loads((evaluation.workdir / "process.json").read_text())["supervisor"], signal.SIGKILL)

    _later(max(after_s, 0.5), act)


def _exit(evaluation: Evaluation, after_s: float) -> None:
    _later(after_s, lambda: os._exit(7))


def _fill_disk(evaluation: Evaluation, after_s: float) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FULL_BYTES, hard))


def _block_result(evaluation: Evaluation, after_s: float) -> None:
    (evaluation.workdir / "result.json").mkdir(parents=True)


def _remove_folder(evaluation: Evaluation, after_s: float) -> None:
    """A file in place of the folder: nothing can be written there any more, also by root."""

    def act() -> None:
        shutil.rmtree(evaluation.workdir, ignore_errors=True)
        evaluation.workdir.write_text("")

    _later(after_s, act)


WELL, BAD, GONE = frozenset({State.MEASURED}), frozenset({State.FAILED}), frozenset({State.LOST, State.FAILED})
"""FAILED for GONE: a setting that is lost twice is taken for the cause."""
ANY = WELL | GONE
"""The moment decides."""
INJURIES = (
    Injury("nothing", WELL, weight=16),
    Injury("crash at start", BAD, fault="crash@weights"),
    Injury("crash under load", BAD, fault="crash@load:after=10"),
    Injury("segfault", BAD, fault="segfault@kv-cache"),
    Injury("killed without a word", BAD, fault="killed@load:after=8"),
    Injury("hang at start", BAD, fault="hang@compilation"),
    Injury("hang under load", BAD, fault="hang@load:after=6"),
    Injury("too slow", BAD, fault="slow-start@weights:seconds=60,zombie-print@configuration"),
    Injury("slow", WELL, fault="slow-start@weights:seconds=2"),
    Injury("leak", WELL, fault="leak@initialization:ttl=600", weight=2),
    Injury("leak and crash", BAD, fault="leak@initialization:ttl=600,crash@load:after=5"),
    Injury("deaf to SIGTERM", WELL, fault="ignore-term@ready"),
    Injury("garbage", BAD, fault="garbage@load:mode=html"),
    Injury("empty answers", BAD, fault="garbage@load:mode=empty:share=0.5"),
    Injury("errors 500", BAD, fault="error500@load:share=0.5"),
    Injury("disconnects", BAD, fault="disconnect@load:share=0.5"),
    Injury("actor SIGKILLed", ANY, weight=3, act=_kill_actor),
    Injury("actor exits", ANY, act=_exit),
    Injury("supervisor SIGKILLed", ANY, weight=3, act=_kill_supervisor),
    Injury("disk full", WELL, weight=2, act=_fill_disk),
    Injury("no room for the result", WELL, act=_block_result),
    Injury("folder removed", ANY, act=_remove_folder),
)


def injury_of(seed: int, number: int) -> tuple[Injury, float]:
    """What is done to trial `number`, and after how many seconds; the baseline is spared."""
    source = random.Random(f"{seed}/{number}")
    chosen = source.choices(INJURIES, [injury.weight for injury in INJURIES])[0] if number else INJURIES[0]
    return chosen, source.uniform(0, _LONGEST_S)


class SoakTrial(EngineTrial):
    """A trial to which something is done."""

    seed: ClassVar[int] = 0

    def _make_evaluation(self) -> Evaluation:
        injury, after_s = injury_of(self.seed, self.config["number"])
        self.config["params"] = {**self.config["params"], "fault": injury.fault}
        evaluation = super()._make_evaluation()
        injury.act(evaluation, after_s)
        return evaluation


@dataclass(frozen=True)
class Sample:
    """The study's driver at one moment."""

    ended: int
    """Trials that have ended."""
    cpu_s: float
    memory_mib: float
    files: int
    threads: int
    available: int
    """Bytes of the machine's memory that are free."""


@dataclass(frozen=True)
class Watched:
    """What was seen of a study from outside."""

    folder: ResultsFolder
    exit_code: int
    said: str
    seconds: float
    samples: Sequence[Sample]
    rays: Sequence[Process]
    """Of a Ray that the driver had for itself."""

    @property
    def between(self) -> tuple[Sample, Sample]:
        """The driver when a fifth of the trials had ended, and at the last one's end."""
        most = max(sample.ended for sample in self.samples)
        first = next(sample for sample in self.samples if sample.ended >= most / 5)
        return first, next(sample for sample in self.samples if sample.ended == most)

    @property
    def driver_ms(self) -> float:
        """CPU that the driver took for a trial, in milliseconds, its start and its end left out."""
        first, last = self.between
        return 1000 * (last.cpu_s - first.cpu_s) / max(last.ended - first.ended, 1)


def write_soak_study(folder: Path, trials: int, slots: int) -> Path:
    """A study of so many short trials."""
    return write_study(
        folder,
        study="soak",
        engine={"args": {"noise": 0.03, "speed": 4, "startup-s": 1}},
        search_space={"max-num-seqs": {"int": [1, 4096]}, "block-size": {"choice": [16, 32]}},
        workload={"traffic": "D(16,16)", "requests": 64, "concurrency": 8},
        search={"trials": trials, "sampler": "random", "max_failures_in_a_row": 1000},
        trial={"timeout_s": 12, "hung_after_s": 6},
        verify={"top": 1, "restarts": 2},
        resources={"cpus": 0.1, "max_concurrent": slots},
    )


def run_soak(folder: Path, trials: int, slots: int, seed: int, address: str | None = None) -> Watched:
    """Run the study in `folder` to its end."""
    study = write_soak_study(folder, trials, slots)
    command = [sys.executable, __file__, str(study), "--seed", str(seed)]
    return watched([*command, *(["--address", address] if address else [])], study)


def watched(command: Sequence[str], study: Path) -> Watched:
    """Run `command`, the driver of `study`, and look at it until it ends."""
    begun, samples, rays = time.monotonic(), list[Sample](), list[Process]()
    with (study.parent / "said").open("w+") as said:
        driver = psutil.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while driver.poll() is None:
            time.sleep(_SAMPLE_S)
            rays = (rays_of(driver.pid) if "--address" not in command else []) or rays
            with suppress(psutil.Error):
                samples.append(_sample(driver, study))
        said.seek(0)
        text = said.read()
    return Watched(only_run(study), driver.wait(), text, time.monotonic() - begun, samples, rays)


def _sample(driver: psutil.Popen, study: Path) -> Sample:
    rows = next(study.parent.glob("results/*/trials.jsonl"), None)
    ended = 0 if rows is None else rows.read_bytes().count(b"\n")
    with driver.oneshot():
        return Sample(
            ended,
            sum(driver.cpu_times()[:2]),
            driver.memory_info().rss / 2**20,
            driver.num_fds(),
            driver.num_threads(),
            psutil.virtual_memory().available,
        )


def left_over(soak: Watched) -> Iterator[str]:
    """What a study must not leave: its processes, listeners on its ports, locks that are held."""
    folder = soak.folder
    yield from (f"Ray's process {command}" for command in left_of(soak.rays))
    for pid, mark in marks(folder.path.name).items():
        yield f"process {pid} ({mark})"
    for path in folder.trials_dir.glob("*/command.json"):
        argv = json.loads(path.read_text())["argv"]
        port = int(argv[argv.index("--port") + 1])
        if not is_free(port):
            yield f"a listener on port {port} of {path.parent.name}"
        lock = FileLock(f"port-{port}")
        if not lock.acquire():
            yield f"a lock on port {port} of {path.parent.name}"
        lock.release()


def accounts(soak: Watched, trials: int, seed: int) -> Iterator[str]:
    """Every way in which the study's books do not balance, as a sentence."""
    rows = soak.folder.read_rows()
    yield from _numbering(soak.folder, rows)
    yield from _endings(rows, seed)
    yield from _retries(rows)
    yield from _told(soak.folder, rows)
    counted = [row for row in rows if row.verifies is None and row.state.teaches]
    if len(counted) != trials:
        yield f"{len(counted)} trials count, but {trials} were asked for"
    settings = Counter(json.dumps(dict(row.params), sort_keys=True) for row in counted)
    yield from (f"{setting} was measured {count} times" for setting, count in settings.items() if count > 1)


def _numbering(folder: ResultsFolder, rows: list[TrialRow]) -> Iterator[str]:
    if [row.number for row in rows] != list(range(len(rows))):
        yield f"numbers are not 0 to {len(rows) - 1}"
    if len({row.trial_id for row in rows}) != len(rows):
        yield "two trials have one id"
    lines = folder.rows_file.read_bytes().count(b"\n")
    there = {entry.name for entry in folder.trials_dir.glob("[0-9]*")}
    if lines != len(rows) or there != {f"{row.number}-{row.trial_id}" for row in rows}:
        yield f"{len(rows)} rows, {lines} lines in trials.jsonl, {len(there)} folders"


def _endings(rows: list[TrialRow], seed: int) -> Iterator[str]:
    for row in rows:
        injury, after_s = injury_of(seed, row.number)
        if row.state not in injury.ends:
            yield f"trial {row.number} ({injury.name} after {after_s:.1f} s) is {row.state}: {row.result.failure}"


def _retries(rows: list[TrialRow]) -> Iterator[str]:
    again = Counter(row.retry_of for row in rows if row.retry_of is not None)
    lost = {row.number for row in rows if row.state is State.LOST}
    yield from (f"trial {number} was run again {count} times" for number, count in again.items() if count > 1)
    yield from (f"trial {number} was run again, but not lost" for number in again if number not in lost)


def _told(folder: ResultsFolder, rows: list[TrialRow]) -> Iterator[str]:
    """Optuna has one ended trial for each trial of the search, complete where it teaches."""
    known = [trial for trial in optuna_trials(folder) if "trial" in trial.user_attrs]
    told = {trial.user_attrs["trial"]: trial for trial in known}
    if len(told) != len(known):
        yield "a trial was told to Optuna twice"
    for row in rows:
        state = told[row.number].state if row.number in told else None
        wanted = TrialState.COMPLETE if row.state.teaches else TrialState.FAIL
        if state is not (None if row.verifies is not None else wanted):
            yield f"trial {row.number} is {row.state}, but to Optuna {state}"
    yield from (
        f"Optuna's trial {one.number} has not ended" for one in optuna_trials(folder) if not one.state.is_finished()
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("study", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--address")
    arguments = parser.parse_args()
    SoakTrial.seed = arguments.seed
    results = arguments.study.parent / "results"
    where = [] if arguments.address is None else [f"ray.address={arguments.address}"]
    return run_study(load_study(arguments.study, where), results, trainable=SoakTrial)


if __name__ == "__main__":
    sys.exit(main())
