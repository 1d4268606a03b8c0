"""One trial with processes of the worst manners, ended in every way that there is.

`run_case` starts a study whose first trial comes to such an end, watches its processes from outside and says what was
seen; tests/test_kill_matrix.py and scripts/bench/kill_matrix both stand on it. Run as a script, this is the study's
driver: `kill_study.py CASE STUDY.yaml [--address A]`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parents[1]))

import ray

from raytune_autotuner.engine.processes import Process, descendants
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.study.file import load_study
from raytune_autotuner.tune.run import run_study
from raytune_autotuner.tune.trainable import EngineTrial, Job
from tests.studies import actor_of, marks, write_study

ROLES = ("child", "grandchild", "setsid", "setsid-grandchild", "daemon", "stubborn")
DEADLINE_S = 14.0
_LEAKED = re.compile(r"leaked (\S+) still prints pid=(\d+)")
_POLL_S = 0.01
_PATIENCE_S = 20.0
_RAYS_PATIENCE_S = 60.0
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


@dataclass(frozen=True)
class Case:
    """One way for a trial to end: by what it does itself, or by what is done to it from outside."""

    name: str
    inside: str = "wait"
    outside: str = ""
    states: tuple[str, ...] | None = ("lost", "measured")
    """Of the study's trials at its end; None where it depends on the moment."""
    exit_code: int = 0
    own_ray: bool = False
    """Whether the driver has its Ray for itself, because Ray ends with it."""

    @property
    def by_deadline(self) -> bool:
        return self.inside.startswith("block")


CASES = {
    case.name: case
    for case in (
        Case("finish", inside="", states=("measured", "measured")),
        Case("raise", inside="raise"),
        Case("os._exit", inside="exit"),
        Case("actor SIGKILLed", outside="kill actor"),
        Case("ray.kill", inside="ray.kill"),
        Case("deadline in set-up", inside="block in set-up", states=("failed", "measured")),
        Case("deadline in load", inside="block in load", states=("failed", "measured")),
        Case("supervisor SIGKILLed", inside="linger", outside="kill supervisor"),
        Case("driver SIGINT", outside="interrupt driver", states=("interrupted",), exit_code=130, own_ray=True),
        Case("driver SIGINT twice", outside="interrupt driver twice", states=None, exit_code=130, own_ray=True),
        Case("driver SIGTERM", outside="terminate driver", states=("interrupted",), exit_code=130, own_ray=True),
        Case("driver SIGKILLed", outside="kill driver", states=("pending",), exit_code=-signal.SIGKILL, own_ray=True),
        Case("raylet killed", outside="kill raylet", states=None, exit_code=1, own_ray=True),
    )
}


class KillTrial(EngineTrial):
    """A trial that, if it is the study's first, comes to a bad end after its first round."""

    how: ClassVar[str] = ""

    def setup(self, config: dict[str, Any], job: Job) -> None:  # type: ignore[override]
        super().setup(config, job)
        self._dir = job.trials_dir / f"{config['number']}-{self.trial_id}"
        self._note("began")
        if self.how == "block in set-up" and config["number"] == 0:
            super().step()
            self._act()

    def step(self) -> dict[str, Any]:
        result = super().step()
        if self.how and self.config["number"] == 0:
            self._act()
        return result

    def _note(self, event: str) -> None:
        note(self._dir, event)

    def _act(self) -> None:
        log = self._dir / "engine.log"
        while set(leaked(log)) != set(ROLES):
            time.sleep(0.05)
        if self.how != "ray.kill":
            self._note("acted")
        if self.how == "raise":
            raise RuntimeError("as a trial may")
        if self.how == "exit":
            os._exit(7)
        if self.how.startswith("block"):
            ctypes.PyDLL(None).sleep(120)  # in C code, and no other thread of the actor runs either
        if self.how == "ray.kill":
            ray.remote(kill).options(num_cpus=0).remote(ray.get_runtime_context().current_actor, self._dir)
        time.sleep(2 if self.how == "linger" else 120)


def note(folder: Path, event: str) -> None:
    """Write the time of `event` into `folder`, whole from the first moment that it can be seen."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{event}"
    draft.write_text(str(time.time()))
    draft.rename(folder / event)


def kill(actor: Any, folder: Path) -> None:
    note(folder, "acted")
    ray.kill(actor)


def leaked(log: Path) -> dict[str, int]:
    """Role to process id of what the engine has leaked so far, by what it prints."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    return {role: int(pid) for role, pid in _LEAKED.findall(text)}


@dataclass
class Outcome:
    """What was seen of a case from outside."""

    case: Case
    late_s: float | None = None
    """From the deadline to the actor's end; only where a deadline ended it."""
    gone_s: float = 0.0
    """From the end (the kill, where a deadline ended it) until the trial's last process was gone."""
    survivors: list[str] = field(default_factory=list)
    """Processes of the trial, its supervisor included, that ran on for 20 seconds."""
    marked: dict[int, str] = field(default_factory=dict)
    """Processes with a mark of the study after its end."""
    rays_left: list[str] = field(default_factory=list)
    """Processes of a Ray that the driver had for itself, after its end."""
    states: tuple[str, ...] = ()
    exit_code: int | None = None
    ended_s: float = 0.0
    """From the end of the trial to the driver's."""
    said: str = ""
    folder: ResultsFolder | None = None


def write_kill_study(folder: Path, case: Case) -> Path:
    """The study of `case`: a tree of processes that leaks from the engine, two rounds."""
    return write_study(
        folder,
        study=f"kill-{re.sub('[^a-z]+', '-', case.name.lower())}",
        engine={"args": {"fault": "leak@initialization", "speed": 20}},
        workload={"rounds": 2, "requests": 4, "concurrency": 4},
        search={"trials": 2 if case.by_deadline or not case.inside else 1},
        trial={"timeout_s": DEADLINE_S if case.by_deadline else 90, "hung_after_s": 60},
        resources={"cpus": 0.5, "max_concurrent": 1},
    )


def run_case(case: Case, folder: Path, address: str | None = None) -> Outcome:
    """Run the study of `case` in `folder`, see its first trial end and the study too."""
    folder.mkdir(parents=True, exist_ok=True)
    study = write_kill_study(folder, case)
    command = [sys.executable, __file__, case.name, str(study)]
    command += [] if case.own_ray or address is None else ["--address", address]
    with (folder / "said").open("w+") as said:
        # In a session of its own, as below a terminal, so that all of its group can be interrupted.
        driver = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            outcome = _watch(case, study, driver)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
        said.seek(0)
        outcome.said = said.read()
    return outcome


def _watch(case: Case, study: Path, driver: subprocess.Popen[bytes]) -> Outcome:
    trial = _await(lambda: _first_trial(study), driver)
    tree = _await(lambda: _tree(trial), driver)
    actor = _process(_await(lambda: actor_of(trial.parents[1].name, trial.name.split("-", 1)[1]), driver))
    rays = rays_of(driver.pid) if case.own_ray else []
    outcome = Outcome(case, folder=ResultsFolder.open(trial.parents[1]))
    if case.inside:
        _await((trial / "acted").exists, driver)
    if case.outside:
        _act(case.outside, driver, actor, tree["supervisor"])
    begun = _end_of_trial(case, trial, actor, outcome)
    outcome.survivors = _survivors(tree)
    outcome.gone_s = max(time.time() - begun, 0.0)
    outcome.exit_code = driver.wait(120)
    outcome.ended_s = time.time() - begun
    outcome.rays_left = left_of(rays)
    outcome.marked = marks(trial.parents[1].name)
    outcome.states = tuple(str(row.state) for row in outcome.folder.read_rows()) if outcome.folder else ()
    if not case.inside and outcome.folder:
        outcome.gone_s = outcome.folder.read_rows()[0].result.seconds["stop"]
    return outcome


def _await(condition: Callable[[], Any], driver: subprocess.Popen[bytes], limit_s: float = 90.0) -> Any:
    until = time.monotonic() + limit_s
    while not (value := condition()):
        if driver.poll() is not None or time.monotonic() > until:
            raise AssertionError(f"the trial did not come up; the driver's exit code: {driver.poll()}")
        time.sleep(_POLL_S)
    return value


def _first_trial(study: Path) -> Path | None:
    return next(study.parent.glob("results/*/trials/0-*"), None)


def _tree(trial: Path) -> dict[str, Process] | None:
    """The trial's processes by role, once all have come up."""
    pids = leaked(trial / "engine.log")
    if set(pids) != set(ROLES):
        return None
    record = json.loads((trial / "process.json").read_text())
    pids |= {"engine": record["engine"], "supervisor": record["supervisor"]}
    return {role: _process(pid) for role, pid in pids.items()}


def _process(pid: int) -> Process:
    found = Process.of(pid)
    return found or Process(pid, 0)


def _act(how: str, driver: subprocess.Popen[bytes], actor: Process, supervisor: Process) -> None:
    if how == "kill actor":
        actor.kill()
    elif how == "kill supervisor":
        supervisor.kill()
    elif how == "kill driver":
        driver.kill()
    elif how == "kill raylet":
        _raylet(driver.pid).kill()
    elif how == "terminate driver":
        driver.terminate()
    else:  # As a terminal does on Ctrl-C: the whole group.
        os.killpg(driver.pid, signal.SIGINT)
        if how.endswith("twice"):
            time.sleep(0.1)
            os.killpg(driver.pid, signal.SIGINT)


def _raylet(driver: int) -> Process:
    names = {p: Path(f"/proc/{p.pid}/comm") for p in descendants(driver)}
    return next(process for process, comm in names.items() if comm.exists() and comm.read_text().strip() == "raylet")


def _end_of_trial(case: Case, trial: Path, actor: Process, outcome: Outcome) -> float:
    """When the trial's end began, in epoch seconds."""
    if case.by_deadline:
        deadline = float((trial / "began").read_text()) + DEADLINE_S
        while actor.alive and time.time() < deadline + _PATIENCE_S:
            time.sleep(_POLL_S)
        outcome.late_s = time.time() - deadline
        return time.time()
    return time.time() if case.outside or not case.inside else float((trial / "acted").read_text())


def _survivors(tree: dict[str, Process]) -> list[str]:
    until = time.monotonic() + _PATIENCE_S
    while (left := [role for role, process in tree.items() if process.alive]) and time.monotonic() < until:
        time.sleep(_POLL_S)
    return left


def rays_of(driver: int) -> list[Process]:
    """The Ray below `driver`, but for its two agents, which take more than a minute to notice that they are alone."""
    return [process for process in descendants(driver) if not _command(process).startswith(_AGENTS)]


def _command(process: Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def left_of(processes: Sequence[Process]) -> list[str]:
    """The command lines of those that do not end within a minute."""
    until = time.monotonic() + _RAYS_PATIENCE_S
    while (left := [process for process in processes if process.alive]) and time.monotonic() < until:
        time.sleep(0.1)
    return [_command(process) for process in left]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("study", type=Path)
    parser.add_argument("--address")
    arguments = parser.parse_args()
    KillTrial.how = CASES[arguments.case].inside
    results = arguments.study.parent / "results"
    where = [] if arguments.address is None else [f"ray.address={arguments.address}"]
    return run_study(load_study(arguments.study, where), results, trainable=KillTrial)


if __name__ == "__main__":
    sys.exit(main())
