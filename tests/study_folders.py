"""Results folders as a study leaves them, without running one: for the tests of what is made from them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from raytune_autotuner.load.engine_metrics import Sample, write_series
from raytune_autotuner.load.parquet import write_records
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.status import Phase, StudyStatus, write_status
from raytune_autotuner.report.writing import write_json
from raytune_autotuner.score.objective import judged, metrics_of_requests
from raytune_autotuner.score.records import RequestRecord
from raytune_autotuner.score.records import measured as records_by_level
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialResult, TrialRow
from tests.report_samples import again, failed, make_study, measured, setting

LEVELS = {"c4": 4, "c16": 16}
VERSIONS = {
    "engine": {"vllm": "0.32.0", "torch": "2.13.0"},
    "packages": {"raytune_autotuner": "0.1.0", "python": "3.11.7"},
    "machine": {"system": "Linux", "processor": "EPYC", "cpus": 16, "memory_gib": 128.0},
    "cluster": "1 node: 16 CPUs, 2 GPUs",
}
HUNG = Failure(Stage.GRAPH_CAPTURE, Kind.HUNG, Blame.PARAMETERS, "no line for 300 s", "Lower max-num-seqs.")


def make_folder(
    parent: Path, rows: Sequence[TrialRow], study: Study | None = None, phase: Phase = "finished"
) -> ResultsFolder:
    """A folder with these rows, as if the study had ended."""
    folder = ResultsFolder.create(parent, study or make_study())
    folder.write_rows(rows)
    folder.write_versions(VERSIONS)
    now = time.time()
    write_status(folder, replace(StudyStatus.begin(1), phase=phase, started_at=now - 125, updated_at=now))
    return folder


def whole_study(parent: Path, count: int = 12, study: Study | None = None) -> ResultsFolder:
    """A study of `count` trials with everything that a report shows; trial 2 wins and is verified."""
    study = study or make_study(workload={"concurrency": list(LEVELS.values())})
    loads = {number: requests(_speed(number), 4.0 if number % 5 == 4 else 0.0) for number in range(count)}
    rows = [_trial(study, number, loads[number]) for number in range(count)]
    for i, of in enumerate((0, 2, 3) * 3):
        row = again(count + i, rows[of], i // 3, 1.0)
        loads[row.number] = requests(_speed(of) * (1 + 0.01 * (i // 3)))
        rows.append(_judged(study, row, loads[row.number]))
    rows = [row if row.score is None else replace(row, relative=row.score / (rows[0].score or 1.0)) for row in rows]
    folder = make_folder(parent, rows, study)
    for row in rows:
        leave_files(folder, row, loads[row.number])
    return folder


def leave_files(folder: ResultsFolder, row: TrialRow, records: Sequence[RequestRecord] | None = None) -> None:
    """What a trial leaves behind: its logs, its command, its requests."""
    place = folder.trial_dir(row.number, row.trial_id)
    place.mkdir(parents=True, exist_ok=True)
    for name in ("trial", "engine"):
        (place / f"{name}.log").write_text("a line\n")
    line = f"vllm serve the-model --max-num-seqs {row.params.get('max-num-seqs', 256)}"
    write_json(place / "command.json", {"argv": line.split(), "launch": f"A=1 {line}", "plain": line})
    if row.state is State.MEASURED:
        write_records(place / "requests.parquet", records or requests(_speed(row.number)))
        write_series(place / "engine_metrics.parquet", {(level, 0): _samples(n) for level, n in LEVELS.items()})


def requests(speed: float, late_s: float = 0.0) -> list[RequestRecord]:
    """A hundred requests at each load level; a faster setting answers sooner, a late one each so many seconds after."""
    return [_request(i, level, load, speed, late_s) for level, load in LEVELS.items() for i in range(100)]


def _request(index: int, level: str, load: int, speed: float, late_s: float) -> RequestRecord:
    begun = index * load / speed
    first = late_s + begun + load / speed * (1 + 0.5 * math.sin(index))
    tokens = tuple(first + 0.1 * load / speed * k for k in range(8))
    return RequestRecord(index, level, 0, "measure", begun, begun, first, tokens[-1], tokens, 128, 8, 8)


def _samples(load: int) -> list[Sample]:
    inner = [Sample(second + 0.5, False, load, second % 3, 0.1 * second) for second in range(8)]
    return [Sample(0.0, True, 0, 0, 0.0), *inner, Sample(8.0, True, 0, 0, 0.0)]


def _speed(number: int) -> float:
    return 143.0 if number == 2 else 100.0 + (number * 7) % 40


def _trial(study: Study, number: int, records: Sequence[RequestRecord]) -> TrialRow:
    params = setting(1 + number * 5 % 64, (16, 32, 64)[number % 3], number % 2 == 0, ("auto", "0-1")[number % 2])
    if number and number % 5 == 1:
        return failed(number, params, *([HUNG] if number % 2 else []))
    return _judged(study, measured(number, 1.0, params if number else None), records)


def _judged(study: Study, row: TrialRow, records: Sequence[RequestRecord]) -> TrialRow:
    metrics = metrics_of_requests(study, records_by_level(records), None)
    return judged(study, row, TrialResult(metrics, None, {"start": 43.2, "total": 70.0}))
