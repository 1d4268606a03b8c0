"""A study whose results belong in an S3 bucket, through the command line: run, read, compared."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from raytune_autotuner.cli import main
from raytune_autotuner.report.store import Store
from tests.studies import command, write_study

if TYPE_CHECKING:
    from tests.s3_server import S3Server

pytestmark = pytest.mark.slow


def await_(condition: Callable[[], object], timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_a_study_in_a_bucket_outlives_an_outage_and_is_read_from_elsewhere(
    tmp_path: Path,
    s3: S3Server,
    ray_address: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.port}")
    bucket = Store(f"s3://{s3.bucket}/studies")
    study = write_study(tmp_path, results=str(bucket), search={"trials": 3}, resources={"max_concurrent": 1})
    run = command(study, "--address", ray_address)
    run[run.index("--results") : run.index("--results") + 2] = []
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
        await_(lambda: any(name.endswith("result.json") for name in bucket.files()))
        (local,) = (tmp_path / "xdg_state_home").rglob("study.log")
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
