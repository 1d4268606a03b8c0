"""The folder that a study run leaves behind.

    <parent>/<study>-<YYYYmmdd-HHMMSS>/
        study.yaml  versions.json  status.json  verdict.json
        trials.jsonl  trials.parquet  trials.csv
        optuna.log  study.log  best.yaml  launch.sh
        trials/<number>-<id>/
            trial.json  trial.log  engine.log  load.log  command.json  quality.json  requests.parquet  result.json

`trials.jsonl` is the truth: a `TrialRow` a line, put there at the trial's end and by number once the study is over.
Parquet and CSV are made from it, for other programs, and are a little behind it in a large study that runs. Every other
file replaces the one before by a rename; so a driver that is killed leaves the last whole state. Secrets are masked.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from raytune_autotuner.report.store import Store
from raytune_autotuner.report.verdict import Verdict
from raytune_autotuner.report.writing import append, atomically, read_json, write_json, write_text
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.file import load_study
from raytune_autotuner.study.masking import mask_values
from raytune_autotuner.study.plain import dump_yaml
from raytune_autotuner.study.space import format_value
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import TrialResult, TrialRow

TRIALS = "trials"
"""The folder of the trials' folders."""
SUGGESTION = "trial.json"
"""A trial's row as it was suggested, in its folder: what is known of one until it has ended."""
COMMAND = "command.json"
"""How its engine was started, in its folder."""
RESULT = "result.json"
"""What a trial came to, in its folder."""
QUALITY = "quality.json"
"""What it lost in quality, or the baseline's answers, put there before the load: for a trial that is ended under it."""
NO_ROW = (ValueError, KeyError, TypeError, AttributeError)
"""What is raised where JSON is not what was written."""
_SAID = {"winner", "sentence", "warning"}
"""What every verdict says."""
_RUN_NAME = re.compile(r"(?P<study>.+)-(?P<time>\d{8}-\d{6})(?:-(?P<n>\d+))?")


@dataclass(frozen=True)
class ResultsFolder:
    """One study run on disk. `create` makes it, `open` finds it again."""

    path: Path
    store: Store | None = None
    """Where it belongs, if not here; see `mirror`."""

    @classmethod
    def create(cls, parent: Path, study: Study, ending: str = "", taken: Container[str] = ()) -> ResultsFolder:
        """A new folder under `parent`, with the study as it is run; raises `ConfigError` where it cannot be made.

        With an `ending` to its name it is no run of the study, and `runs` does not list it. The name is none of those
        that are `taken`.
        """
        folder = cls(_make_unique(parent, f"{study.study}-{datetime.now():%Y%m%d-%H%M%S}{ending}", taken))
        folder.trials_dir.mkdir()
        folder.write_study(study)
        return folder

    @classmethod
    def open(cls, path: Path) -> ResultsFolder:
        """The results folder at `path`; raises `ConfigError` where there is none."""
        folder = cls(path.absolute())
        if folder.study_file.is_file():
            return folder
        if not path.exists():
            raise ConfigError(f"{path}: no such folder.")
        runs = cls.runs(path) if path.is_dir() else []
        hint = f" Did you mean {runs[-1].path}?" if runs else " Name the folder that a study's run printed."
        raise ConfigError(f"{path}: not a results folder: it has no study.yaml.{hint}")

    @classmethod
    def runs(cls, parent: Path, study: str | None = None) -> list[ResultsFolder]:
        """The runs in `parent` (of one study, if named), oldest first."""
        names = order_runs((entry.name for entry in parent.iterdir()) if parent.is_dir() else (), study)
        found = [cls(parent.absolute() / name) for name in names]
        return [run for run in found if run.study_file.is_file()]

    @property
    def parent(self) -> Path | Store:
        """Where its sister runs lie."""
        return self.path.parent if self.store is None else self.store.parent

    @property
    def place(self) -> str:
        """Where people look for it: the store that it is brought to or was fetched from, or its path."""
        return str(self.store or self.path)

    @property
    def study_file(self) -> Path:
        """The study as it was run, defaults filled in."""
        return self.path / "study.yaml"

    @property
    def versions_file(self) -> Path:
        """Engine, Ray, Optuna, machine, git."""
        return self.path / "versions.json"

    @property
    def status_file(self) -> Path:
        """Whether the study runs, and what its running trials do."""
        return self.path / "status.json"

    @property
    def rows_file(self) -> Path:
        """A `TrialRow` a line."""
        return self.path / "trials.jsonl"

    @property
    def parquet_file(self) -> Path:
        """The results table, typed."""
        return self.path / "trials.parquet"

    @property
    def csv_file(self) -> Path:
        """The results table, as text."""
        return self.path / "trials.csv"

    @property
    def optuna_log(self) -> Path:
        """Optuna's journal storage."""
        return self.path / "optuna.log"

    @property
    def study_log(self) -> Path:
        """What happened in all trials, a line an event."""
        return self.path / "study.log"

    @property
    def best_file(self) -> Path:
        """The winner, as the engine's configuration file."""
        return self.path / "best.yaml"

    @property
    def verdict_file(self) -> Path:
        """What the study recommends, with every figure that it rests on."""
        return self.path / "verdict.json"

    @property
    def verifies_file(self) -> Path:
        """Of a run that verifies an earlier one: what that claimed, and what is different now."""
        return self.path / "verifies.json"

    @property
    def launch_file(self) -> Path:
        """The winner, as a script that serves it."""
        return self.path / "launch.sh"

    @property
    def trials_dir(self) -> Path:
        """A folder a trial."""
        return self.path / TRIALS

    def trial_dir(self, number: int, trial_id: str) -> Path:
        """The trial's own folder; made by whoever writes first."""
        return self.trials_dir / f"{number}-{trial_id}"

    def find_trial_dir(self, number: int) -> Path:
        """The folder of trial `number`; raises `ConfigError` where there is none."""
        if found := sorted(self.trials_dir.glob(f"{number}-*")):
            return found[0]
        known = sorted(int(entry.name.split("-")[0]) for entry in self.trials_dir.glob("[0-9]*-*"))
        have = f"It has trials {known[0]} to {known[-1]}." if known else "No trial has started yet."
        raise ConfigError(f"{self.place}: there is no trial {number}. {have}")

    def write_study(self, study: Study) -> None:
        """Replace `study.yaml`."""
        write_text(self.study_file, study_yaml(study))

    def load_study(self) -> Study:
        """The study as it was run; secrets in it are masked."""
        return load_study(self.study_file)

    def write_versions(self, versions: Mapping[str, Any]) -> None:
        """Write `versions.json`."""
        write_json(self.versions_file, versions)

    def read_versions(self) -> dict[str, Any]:
        """What `write_versions` wrote last; empty before that, or where it is broken."""
        return read_json(self.versions_file) or {}

    def write_rows(self, rows: Sequence[TrialRow]) -> None:
        """Replace the results table by `rows`, the truth first."""
        ordered = sorted(rows, key=lambda row: row.number)
        write_text(self.rows_file, "".join(map(_line, ordered)), durable=True)
        self.write_tables(ordered)

    def add_row(self, row: TrialRow) -> None:
        """Put a trial that has ended into `trials.jsonl`, whole or not at all; call it once a trial."""
        append(self.rows_file, _line(row))

    def write_tables(self, rows: Sequence[TrialRow]) -> None:
        """Replace Parquet and CSV; `rows` by number."""
        _write_tables(rows, self._objectives(rows), self.parquet_file, self.csv_file)

    def add_suggestion(self, row: TrialRow) -> None:
        """Make the trial's folder, with its row as it was suggested."""
        trial_dir = self.trial_dir(row.number, row.trial_id)
        trial_dir.mkdir(parents=True, exist_ok=True)
        write_json(trial_dir / SUGGESTION, row.to_dict())

    def read_rows(self) -> list[TrialRow]:
        """All trials by number: as they ended, those that have not ended as they were suggested."""
        ended = {row.number: row for row in self.read_ended()}
        return sorted([*ended.values(), *self._suggested(ended)], key=lambda row: row.number)

    def read_ended(self) -> Iterator[TrialRow]:
        """The trials that have ended, in the order in which they did; see `add_row`."""
        lines = self.rows_file.read_bytes().split(b"\n") if self.rows_file.exists() else [b""]
        # After the last line end comes half a line: of a driver that was killed, or that is writing it.
        return (self._row(number, line) for number, line in enumerate(lines[:-1], start=1))

    def _row(self, number: int, line: bytes) -> TrialRow:
        try:
            return TrialRow.from_dict(json.loads(line))
        except NO_ROW as error:
            remedy = "Put a copy of it back, or take the line out: what the trial has left in its folder counts then."
            raise ConfigError(f"{self.rows_file}, line {number}: is no trial's row: {error}.\n{remedy}") from error

    def _suggested(self, ended: Container[int]) -> Iterator[TrialRow]:
        """The trials that have begun and are not among the `ended`."""
        for entry in os.scandir(self.trials_dir) if self.trials_dir.is_dir() else ():
            number = entry.name.partition("-")[0]
            begun = number.isdecimal() and int(number) not in ended
            if begun and (row := read_suggestion(Path(entry.path, SUGGESTION))) is not None:
                yield row  # where it is broken, nobody knows what it was to measure

    def read_command(self, row: TrialRow) -> dict[str, Any]:
        """How a trial's engine was started; empty where it was not, or where that is broken."""
        return read_json(self.trial_dir(row.number, row.trial_id) / COMMAND) or {}

    def read_row(self, number: int) -> TrialRow:
        """The row of trial `number`; raises `ConfigError` where there is none."""
        rows = self.read_rows()
        found = next((row for row in rows if row.number == number), None)
        if found is None:
            have = f"It has trials {rows[0].number} to {rows[-1].number}." if rows else "No trial has started yet."
            raise ConfigError(f"--trial {number}: {self.place} has no such trial. {have}")
        return found

    def write_verdict(self, answer: Verdict) -> None:
        """Write `verdict.json`."""
        write_json(self.verdict_file, answer.to_dict(), durable=True)

    def read_verdict(self) -> dict[str, Any] | None:
        """What `write_verdict` wrote last; None before that, or where it is broken."""
        found = read_json(self.verdict_file)
        return found if found is not None and found.keys() >= _SAID else None

    def _objectives(self, rows: Sequence[TrialRow]) -> list[str]:
        """The metrics of several objectives; nothing where there is one."""
        if not any(len(row.scores) > 1 for row in rows):
            return []
        return [metric for metric, _ in self.load_study().objective.targets]


def write_result(trial_dir: Path, result: TrialResult, name: str = RESULT) -> None:
    """Write the trial's result, or what is known of it so far; it survives the trial's processes."""
    write_json(trial_dir / name, result.to_dict(), durable=True)


def read_result(trial_dir: Path, name: str = RESULT) -> TrialResult | None:
    """What `write_result` wrote, or None where the trial left no result that can be read."""
    try:
        found = read_json(trial_dir / name)
        return None if found is None else TrialResult.from_dict(found)
    except (ConfigError, *NO_ROW):
        return None


def read_suggestion(path: Path) -> TrialRow | None:
    """A trial as it was suggested, or None where nothing that can be read says so."""
    found = read_json(path)
    try:
        return None if found is None else TrialRow.from_dict(found)
    except NO_ROW:
        return None


def _line(row: TrialRow) -> str:
    return json.dumps(mask_values(row.to_dict()), allow_nan=False) + "\n"


def flat_row(row: TrialRow, objectives: Sequence[str] = ()) -> dict[str, Any]:
    """A row as one flat mapping: the columns of the results table; `objectives` are the metrics of several."""
    failure = row.result.failure
    cells: dict[str, Any] = {
        "number": row.number,
        "trial_id": row.trial_id,
        "name": row.name,
        "state": str(row.state),
        "stage": str(failure.stage) if failure else None,
        "kind": str(failure.kind) if failure else None,
        "blame": str(failure.blame) if failure else None,
        "evidence": failure.evidence if failure else None,
        "remedy": failure.remedy if failure else None,
        "score": row.score,
        **{f"score:{metric}": score for metric, score in zip(objectives, row.scores, strict=False)},
        "penalty": row.penalty,
        "violation": row.violation,
        "relative": row.relative,
        "bound": row.bound,
        "retry_of": row.retry_of,
        "verifies": row.verifies,
        "restart": row.restart,
        "node": row.result.node or None,
        "hardware": row.result.hardware or None,
        "taken_from": row.taken_from,
    }
    cells |= {f"param:{name}": value for name, value in row.params.items()}
    cells |= dict(row.result.metrics)
    return cells | {f"seconds:{phase}": seconds for phase, seconds in row.result.seconds.items()}


def order_runs(names: Iterable[str], study: str | None = None) -> list[str]:
    """Those of the names that a run has (of one study, if named), oldest first."""
    found = [match for name in names if (match := _RUN_NAME.fullmatch(name)) and study in (None, match["study"])]
    return [match[0] for match in sorted(found, key=lambda match: (match["time"], int(match["n"] or 1)))]


def _make_unique(parent: Path, name: str, taken: Container[str]) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for n in range(1, 1000):
            path = parent.absolute() / (name if n == 1 else f"{name}-{n}")
            if path.name in taken:
                continue
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
    except OSError as error:
        raise ConfigError(f"--results {parent}: cannot be written to: {error.strerror}.") from error
    raise ConfigError(f"--results {parent}: a thousand runs named {name} are there already.")


def study_yaml(study: Study) -> str:
    """The text of `study.yaml`: defaults filled in, secrets masked."""
    return f"# The study as it was run, defaults filled in.\n{dump_yaml(mask_values(_plain(study)))}"


def _plain(model: BaseModel) -> dict[str, Any]:
    """A model's values, its unset optional ones left out."""
    values = model.model_dump(mode="json")
    for name in type(model).model_fields:
        value = getattr(model, name)
        if value is None:
            del values[name]
        elif isinstance(value, BaseModel):
            values[name] = _plain(value)
    return values


def _columns(rows: Sequence[TrialRow], objectives: Sequence[str]) -> dict[str, list[Any]]:
    """Column to cells; parameters, metrics and seconds in the order in which they are met."""
    flat = [mask_values(flat_row(row, objectives)) for row in rows]
    met = dict.fromkeys(name for row in flat for name in row)
    names = sorted(met, key=lambda name: (name.startswith("seconds:"), name.startswith("param:")))
    return {name: [row.get(name) for row in flat] for name in names}


def _write_tables(rows: Sequence[TrialRow], objectives: Sequence[str], parquet: Path, csv: Path) -> None:
    import pyarrow as pa
    import pyarrow.csv as pa_csv
    import pyarrow.parquet as pa_parquet

    columns = _columns(rows, objectives)
    table = pa.table({name: pa.array(_one_type(cells)) for name, cells in columns.items()})
    with atomically(parquet) as part:
        pa_parquet.write_table(table, part)
    with atomically(csv) as part:
        pa_csv.write_csv(table, part)


def _one_type(cells: Sequence[Any]) -> list[Any]:
    """Cells that share one column type: mixed ones, mappings and lists become text."""
    types = {type(cell) for cell in cells if cell is not None}
    if types == {int} and all(cell is None or abs(cell) < 2**63 for cell in cells):
        return list(cells)
    if types and types <= {int, float}:
        return [None if cell is None else float(cell) for cell in cells]
    if types <= {bool}:
        return list(cells)
    return [None if cell is None else format_value(cell).encode("utf-8", "replace").decode() for cell in cells]
