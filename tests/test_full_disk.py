"""Where nothing can be written any more: a trial keeps its result, and the study ends with a word."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from ray.tune import TuneError

from raytune_autotuner.engine.catalog import make_engine
from raytune_autotuner.engine.reading import SIMULATED_RULES
from raytune_autotuner.report.logs import LogWriter
from raytune_autotuner.report.results import ResultsFolder, read_result
from raytune_autotuner.report.writing import cut_half_line
from raytune_autotuner.study.failure import Blame
from raytune_autotuner.study.file import load_study
from raytune_autotuner.tune.evaluate import Evaluation
from raytune_autotuner.tune.reporter import TrialReporter
from raytune_autotuner.tune.run import _error_of_a_file
from raytune_autotuner.tune.samplers import make_sampler
from raytune_autotuner.tune.searcher import StudySearch
from raytune_autotuner.tune.standing import Standing
from raytune_autotuner.tune.tell import Teller
from tests.studies import write_study


def test_a_log_loses_lines_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "trial.log").symlink_to("/dev/full")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "trial.log", tmp_path / "file" / "trial.log"):
        with LogWriter(path) as log:
            log.write_study("nowhere to go")


def test_half_a_line_at_the_end_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "optuna.log"
    for text, left in (('{"a": 1}\n{"b', '{"a": 1}\n'), ('{"a', ""), ('{"a": 1}\n', '{"a": 1}\n'), ("", "")):
        path.write_text(text)
        cut_half_line(path)
        assert path.read_text() == left
    cut_half_line(tmp_path / "missing")


def test_a_result_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "result.json").mkdir()
    assert read_result(tmp_path) is None


def test_a_trial_without_a_place_to_write_is_no_settings_fault(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    (tmp_path / "trial").write_text("a file in its place")
    rounds = Evaluation(study, make_engine(study), {}, tmp_path / "trial", "run", "id").run()
    with pytest.raises(StopIteration) as stop:
        next(rounds)
    failure = stop.value.value.failure
    assert (failure.blame, "NotADirectoryError" in failure.evidence) == (Blame.ENVIRONMENT, True)


def test_what_ray_tune_would_keep_to_itself_ends_the_search(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    folder = ResultsFolder.create(tmp_path / "results", study)
    reporter = TrialReporter(study, folder, SIMULATED_RULES, standing_of=lambda trial_id: Standing())
    search = StudySearch(
        study,
        reporter,
        sampler=make_sampler(study, 1)[0],
        storage=optuna.storages.InMemoryStorage(),
        teller=Teller(study),
        defaults={},
        slots=lambda: 2,
        placement=lambda params: {},
        may_start=lambda: True,
        may_verify=lambda: False,
    )
    search.suggest("a")
    folder.rows_file.mkdir()
    search.on_trial_complete("a", {})
    with pytest.raises(IsADirectoryError):
        search.suggest("b")


def test_the_file_behind_an_error_of_ray_tune_is_found() -> None:
    def fail(first: Exception) -> TuneError:
        try:
            try:
                raise first
            except type(first):
                raise TuneError("as Ray Tune says it")  # noqa: B904  as Ray Tune does
        except TuneError as error:
            return error

    full = OSError(28, "No space left on device")
    assert _error_of_a_file(fail(full)) is full
    assert _error_of_a_file(fail(ConnectionResetError())) is None
    assert _error_of_a_file(fail(ValueError())) is None
