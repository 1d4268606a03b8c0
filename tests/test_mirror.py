"""The mirror: a run's folder comes to its store, whatever the store does meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raytune_autotuner.report.mirror import Mirror
from raytune_autotuner.report.store import Store
from raytune_autotuner.study.errors import StudyError

ROUND_S = 0.05


class Run:
    """A folder with a mirror to a shared path, which can be in the way of it."""

    def __init__(self, parent: Path) -> None:
        self.folder = parent / "run"
        self.there = parent / "shared" / "run"
        self.said: list[str] = []
        self.write("study.yaml", "study: one")

    def mirror(self, patience_s: float = 0.0, round_s: float = ROUND_S) -> Mirror:
        store = Store(self.there.as_uri())
        return Mirror(self.folder, store, self.said.append, round_s=round_s, patience_s=patience_s)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def come(self) -> dict[str, str]:
        """What has come to the store."""
        found = self.there.rglob("*") if self.there.is_dir() else []
        return {str(path.relative_to(self.there)): path.read_text() for path in found if path.is_file()}

    def lose_store(self) -> None:
        self.there.parent.rename(self.there.parent.with_name("away"))
        self.there.parent.write_text("in the way")

    def find_store(self) -> None:
        self.there.parent.unlink()
        self.there.parent.with_name("away").rename(self.there.parent)

    def lose_at_the_end(self, error: Exception | None = None) -> None:
        """A study whose store goes away and does not come back; it ends with `error`, if any."""
        with self.mirror():
            await_(self.come)
            self.lose_store()
            self.write("report.html", "<html>")
            if error is not None:
                raise error


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def await_(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_folders_own_files_come_while_the_study_runs(run: Run) -> None:
    with run.mirror():
        await_(lambda: run.come() == {"study.yaml": "study: one"})
        run.write("status.json", "running")
        await_(lambda: run.come().get("status.json") == "running")
        run.write("status.json", "finished")
        await_(lambda: run.come()["status.json"] == "finished")


def test_a_trials_files_come_once_they_are_due_and_all_at_the_end(run: Run) -> None:
    ended = run.write("trials/0-a/trial.log", "a line").parent
    running = run.write("trials/1-b/trial.log", "a line").parent
    run.write("trials/1-b/trial.json", "{}")
    run.write("trials/1-b/.hidden.part", "half")
    (run.folder / "optuna.log.lock").symlink_to("study.yaml")
    with run.mirror() as mirror:
        mirror.due(ended)
        mirror.due(running / "trial.json")
        await_(lambda: run.come().keys() == {"study.yaml", "trials/0-a/trial.log", "trials/1-b/trial.json"})
    assert run.come().keys() == {
        "study.yaml",
        "trials/0-a/trial.log",
        "trials/1-b/trial.json",
        "trials/1-b/trial.log",
    }


def test_what_is_due_does_not_wait_for_the_next_round(run: Run) -> None:
    with run.mirror(round_s=3600) as mirror:
        await_(run.come)
        mirror.due(run.write("trials/0-a/result.json", "{}"))
        await_(lambda: len(run.come()) == 2)


def test_no_table_comes_without_what_its_rows_speak_of(run: Run) -> None:
    for name in ("status.json", "trials.jsonl", "optuna.log"):
        run.write(name, "one trial")
    (run.there / "optuna.log").mkdir(parents=True)  # in the way of it
    with run.mirror():
        await_(lambda: run.said)
        assert not {"trials.jsonl", "status.json"} & run.come().keys()
        (run.there / "optuna.log").rmdir()
    assert {"optuna.log", "trials.jsonl", "status.json"} <= run.come().keys()


def test_what_has_not_changed_is_not_brought_twice(run: Run) -> None:
    with run.mirror():
        await_(run.come)
        before = (run.there / "study.yaml").stat().st_ino
        run.write("more", "more")
        await_(lambda: "more" in run.come())
    assert (run.there / "study.yaml").stat().st_ino == before  # a file brought anew is another file


def test_a_store_that_is_away_for_a_while_is_told_of_once_and_misses_nothing(run: Run) -> None:
    with run.mirror() as mirror:
        await_(run.come)
        run.lose_store()
        mirror.due(run.write("trials/0-a/result.json", "{}").parent)
        await_(lambda: run.said)
        mirror.due(run.write("trials/1-b/result.json", "{}").parent)
        time.sleep(5 * ROUND_S)
        run.find_store()
        await_(lambda: len(run.come()) == 3)
        await_(lambda: len(run.said) == 2)
    assert "does not take the results, which are kept in " + str(run.folder) in run.said[0]
    assert "takes the results again" in run.said[1]


def test_a_store_that_comes_back_after_the_studys_end_still_gets_everything(run: Run) -> None:
    with run.mirror(patience_s=60):
        await_(run.come)
        run.lose_store()
        run.write("report.html", "<html>")
        await_(lambda: run.said)
        run.find_store()
    assert run.come().keys() == {"study.yaml", "report.html"}


def test_a_store_that_never_comes_back_leaves_the_folder_and_says_where_it_is(run: Run) -> None:
    with pytest.raises(StudyError, match=rf"never came to file:.*\nThey are whole in {run.folder}"):
        run.lose_at_the_end()
    assert (run.folder / "report.html").is_file()


def test_an_error_of_the_study_is_not_hidden_by_one_of_the_store(run: Run) -> None:
    with pytest.raises(KeyError):
        run.lose_at_the_end(KeyError("the study's own"))
    assert "never came" in run.said[-1]
