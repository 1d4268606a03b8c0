"""Studies whose results belong in an S3 bucket, through the command line: run, read, gone on with, learned from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from raytune_autotuner.cli import main
from raytune_autotuner.report.runs import open_run
from raytune_autotuner.report.store import Store
from raytune_autotuner.study.file import load_study
from raytune_autotuner.study.trial import TrialRow
from raytune_autotuner.tune.cache import read_cache
from raytune_autotuner.tune.warm_start import learn_from_earlier
from tests.studies import command, optuna_trials, write_study

if TYPE_CHECKING:
    from tests.s3_server import S3Server

pytestmark = pytest.mark.slow
PROGRAM = [sys.executable, "-m", "raytune_autotuner"]


def await_(condition: Callable[[], object], timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.fixture
def machine(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine's folders for what belongs in stores; it knows the server by its environment."""
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "machine" / name.lower()))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.port}")
    return tmp_path / "machine"


def of(study: Path, *options: str) -> list[str]:
    """The command that runs `study` with its results where it says itself."""
    words = command(study, *options)
    words[words.index("--results") : words.index("--results") + 2] = []
    return words


def done(words: list[str]) -> int:
    """The exit code of a command that ends by itself."""
    found = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    print(found.stdout, found.stderr)
    return found.returncode


def ended(run: Store) -> list[TrialRow]:
    """The trials that have ended, as the store knows them."""
    lines = run.read("trials.jsonl").splitlines() if "trials.jsonl" in run.files(recursive=False) else []
    return [TrialRow.from_dict(json.loads(line)) for line in lines]


def settings(rows: list[TrialRow]) -> list[str]:
    return [json.dumps(dict(row.params), sort_keys=True) for row in rows]


def test_a_study_whose_machine_is_lost_goes_on_and_is_learned_from_by_its_uri(
    tmp_path: Path, machine: Path, s3: S3Server, ray_address: str
) -> None:
    bucket, at = Store(f"s3://{s3.bucket}/lost"), ["--address", ray_address]
    changes = {"results": str(bucket), "resources": {"cpus": 1, "max_concurrent": 2}, "verify": {"restarts": 2}}
    study = write_study(tmp_path, **changes)
    with subprocess.Popen(of(study, *at), stdout=subprocess.DEVNULL) as driver:
        await_(lambda: sum(len(ended(bucket / name)) for name in bucket.folders()) >= 2)
        driver.kill()
    (name,) = bucket.folders()
    there, before = bucket / name, ended(bucket / name)
    shutil.rmtree(machine)
    assert done(of(study, *at, "--resume")) == 0
    run = open_run(there)
    rows = run.read_rows()
    measured = [row for row in rows if row.state.teaches]
    assert all(row in rows for row in before)
    assert len(measured) == len(set(settings(measured))) == 4
    told = [trial.user_attrs.get("trial") for trial in optuna_trials(run) if trial.state.name == "COMPLETE"]
    assert sorted(number for number in told if number is not None) == [row.number for row in measured]
    tables = {f"trials/{row.number}-{row.trial_id}/requests.parquet" for row in measured}
    assert tables <= there.files().keys()

    known, search = run.read_versions(), {"search": {"cache": True, "warm_start": str(there)}}
    study_again = load_study(write_study(tmp_path, **changes, **search))
    assert len(read_cache(study_again, known, bucket, known["defaults"]).answers) == 4
    assert [len(learned.rows) for learned in learn_from_earlier(study_again, known)] == [4]

    assert done([*PROGRAM, "verify", str(there), "--trial", str(measured[1].number), *at]) in (0, 1)
    (again,) = set(bucket.folders()) - {name}
    assert [row.state.name for row in ended(bucket / again)].count("MEASURED") == 4
    assert main(["compare", str(there), str(bucket / again)]) == 0


def test_a_study_in_a_bucket_outlives_an_outage_and_is_read_from_elsewhere(
    tmp_path: Path,
    s3: S3Server,
    ray_address: str,
    machine: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    bucket = Store(f"s3://{s3.bucket}/studies")
    study = write_study(tmp_path, results=str(bucket), search={"trials": 3}, resources={"max_concurrent": 1})
    with subprocess.Popen(
        of(study, "--address", ray_address), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as driver:
        await_(lambda: any(name.endswith("result.json") for name in bucket.files()))
        (local,) = machine.rglob("study.log")
        with s3.away():
            assert main(["status", str(bucket / local.parent.name)]) == 2
            assert "cannot be read" in capfd.readouterr().err
            assert main([str(study), "--trials", "4"]) == 2
            assert "cannot be written" in capfd.readouterr().err
            await_(lambda: "does not take the results" in local.read_text())
        said, warned = driver.communicate(timeout=200)
    assert driver.returncode == 0, said + warned
    assert warned.count("does not take the results") == 1
    assert "results are brought to" in said
    assert f"logs {bucket}/{local.parent.name} 0 --engine" in said

    (name,) = bucket.folders()
    here, there = local.parent, bucket / name
    written = [*here.glob("*"), *here.glob("trials/*/[!.]*")]
    names = {str(path.relative_to(here)) for path in written if path.is_file()}
    assert set(there.files()) == names
    assert [name for name in names if there.read(name) != (here / name).read_bytes()] == []

    for words, expected in [
        (["status"], f"study test in {there}"),
        (["logs"], "finished:"),
        (["logs", "0"], "[load]"),
        (["logs", "0", "--engine", "--follow"], "[load]"),
        (["export"], "--"),
        (["report"], f"{there / 'report.html'}\n"),
    ]:
        assert main([words[0], str(there), *words[1:]]) == 0
        assert expected in capfd.readouterr().out, words
    assert main(["compare", str(there), str(here), "--json"]) == 0
    assert [one["results"] for one in json.loads(capfd.readouterr().out)["studies"]] == [str(there), str(here)]
    assert main(["check", str(study), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["likely_s"] is not None

    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    texts += [bucket.read(key) for key in bucket.files()]
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    assert not [text for text in [*texts, said.encode(), warned.encode()] if secret in text]
