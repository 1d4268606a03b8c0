"""What is refused before a start: by the simulated engine's own rules, and by a process that is asked line by line.

The process is a real one that runs the real script; only the package `vllm` in it is a small stand-in, so that its
import takes no time and each check can be made to do what is looked for. `tests/vllm` asks the real one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.engine.flags import environment as environment_of
from raytune_autotuner.engine.processes import Process
from raytune_autotuner.engine.reading import VLLM_RULES
from raytune_autotuner.engine.refusal import refusal
from raytune_autotuner.engine.simulated.engine import SimulatedEngine
from raytune_autotuner.engine.vllm import VllmEngine
from raytune_autotuner.engine.vllm_checker import VllmChecker
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Blame, Kind, Stage
from raytune_autotuner.study.file import parse_study
from tests.studies import BASE, merged

STAND_IN = {
    "__init__.py": "import os, time\n__version__ = '0'\ntime.sleep(float(os.environ.get('IMPORT_S', 0)))\n",
    "envs.py": "",
    "utils/__init__.py": "",
    "utils/argparse_utils.py": "from argparse import ArgumentParser as FlexibleArgumentParser\n",
    "entrypoints/__init__.py": "",
    "entrypoints/launchers/__init__.py": "",
    "entrypoints/launchers/cli_args.py": """
        def make_arg_parser(parser):
            parser.add_argument("--model")
            parser.add_argument("--max-num-seqs", type=int, default=16)
            parser.add_argument("--dtype", choices=["auto", "half"], default="auto")
            parser.add_argument("--act", default="")
            return parser
        """,
    "usage/__init__.py": "",
    "usage/usage_lib.py": "class UsageContext:\n    OPENAI_API_SERVER = 1\n",
    "engine/__init__.py": "",
    "engine/arg_utils.py": """
        import os, sys, time
        from types import SimpleNamespace

        class AsyncEngineArgs:
            @classmethod
            def from_cli_args(cls, parsed):
                made = cls()
                made.parsed = parsed
                return made

            def create_engine_config(self, context):
                act = self.parsed.act
                print("a line that is no answer")
                if act == "crash":
                    os._exit(7)
                if act == "hang":
                    time.sleep(600)
                if act == "need" and "NEEDED" not in os.environ:
                    raise ValueError("NEEDED is not set")
                if act.startswith("raise "):
                    raise ValueError(act.removeprefix("raise "))
                os.environ.setdefault("LEFT_BEHIND", act)
                seen = int(os.environ["SEEN"]) if "SEEN" in os.environ else 0
                left = os.environ["LEFT_BEHIND"]
                sizes = SimpleNamespace(max_num_seqs=self.parsed.max_num_seqs, seen=seen, left=left)
                return SimpleNamespace(scheduler_config=sizes)
        """,
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables under which a Python finds the stand-in."""
    folder = tmp_path_factory.mktemp("stand-in")
    for name, text in STAND_IN.items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return {"PYTHONPATH": str(folder)}


@pytest.fixture
def checker(environment: dict[str, str]) -> Iterator[VllmChecker]:
    with VllmChecker(sys.executable, environment) as checker:
        yield checker


def ask(checker: VllmChecker, *argv: str, **env: str) -> tuple[Any, ...] | None:
    """The kind, stage and evidence that a setting is refused with; of an accepted one the values in force."""
    verdict = checker.check(argv, env, ["max-num-seqs", "seen", "left"])
    if verdict is None or not verdict.lines:
        return None if verdict is None else tuple(verdict.in_force.values())
    failure = refusal(verdict.lines, verdict.exit_code, VLLM_RULES)
    return None if failure is None else (failure.kind, failure.stage, failure.evidence)


def test_a_setting_that_vllm_takes_comes_back_with_the_values_in_force(checker: VllmChecker) -> None:
    assert ask(checker, "--max-num-seqs", "4") == (4, 0, "")
    assert ask(checker) == (16, 0, "")


def test_a_setting_that_vllm_refuses_is_the_failure_that_its_start_would_be(checker: VllmChecker) -> None:
    assert ask(checker, "--dtype", "float8") == (
        Kind.BAD_ARGUMENT,
        Stage.ARGUMENTS,
        "vllm: error: argument --dtype: invalid choice: 'float8' (choose from 'auto', 'half')",
    )
    tokens = "max_num_batched_tokens (4) must be greater than or equal to max_num_seqs (64)"
    assert ask(checker, "--act", f"raise {tokens}") == (
        Kind.INVALID_CONFIG,
        Stage.CONFIGURATION,
        f"ValueError: {tokens}",
    )


@pytest.mark.parametrize(
    "words",
    [
        "401 Client Error. Cannot access gated repo",
        "Connection timed out: couldn't connect to 'https://hub', check your internet connection and try again",
        "Failed to infer device type",
        "World size (8) is larger than the number of available GPUs (1) in this node",
        "Cannot re-initialize CUDA in forked subprocess",
    ],
)
def test_nothing_is_refused_for_the_model_the_hub_or_this_machine(checker: VllmChecker, words: str) -> None:
    assert ask(checker, "--act", f"raise {words}") is None


def test_an_error_that_no_rule_knows_refuses_nothing() -> None:
    assert refusal(["Traceback (most recent call last):", '  File "x", line 1', "Odd: ?"], 1, VLLM_RULES) is None
    assert refusal([], 1, VLLM_RULES) is None


def test_nothing_of_one_check_is_seen_by_the_next(checker: VllmChecker) -> None:
    assert ask(checker, "--act", "first", SEEN="3") == (16, 3, "first")
    assert ask(checker, "--act", "second") == (16, 0, "second")
    assert ask(checker, "--act", "second", LEFT_BEHIND="mine") == (16, 0, "mine")
    assert "SEEN" not in os.environ


def test_one_process_answers_about_flags_and_settings(checker: VllmChecker) -> None:
    given = [["max-num-seqs", "many", ["--max-num-seqs", "many"]], ["max-num-seq", 1, ["--max-num-seq", "1"]]]
    answer = checker.examine({"model": "m", "args": [], "candidates": given})
    assert answer["unknown"] == {"max-num-seq": "max-num-seqs"}
    assert answer["rejected"] == [["max-num-seqs", "many", "argument --max-num-seqs: invalid int value: 'many'"]]
    good = {"model": "m", "args": [["max-num-seqs", 8, ["--max-num-seqs", "8"]]], "candidates": [["dtype", "auto", []]]}
    assert checker.examine(good)["defaults"] == {"dtype": "auto"}
    assert ask(checker) == (16, 0, "")


def pid(checker: VllmChecker) -> int:
    assert checker._process is not None
    return checker._process.pid


def test_a_check_that_ends_the_process_refuses_nothing_and_the_next_is_answered(
    checker: VllmChecker, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask(checker, "--act", "crash") is None
    assert "exit code 7" in caplog.text
    assert ask(checker) == (16, 0, "")
    assert not checker.gave_up


def test_after_two_losses_settings_are_checked_no_more(checker: VllmChecker, caplog: pytest.LogCaptureFixture) -> None:
    assert ask(checker) == (16, 0, "")
    os.kill(pid(checker), signal.SIGKILL)
    assert ask(checker, "--dtype", "float8") is None
    assert ask(checker) == (16, 0, "")
    os.kill(pid(checker), signal.SIGKILL)
    assert ask(checker, "--dtype", "float8") is None
    assert checker.gave_up
    assert "Settings are not checked any more" in caplog.text
    assert ask(checker, "--dtype", "float8") is None, "and no process is started"
    assert checker._process is None


def test_a_check_that_hangs_is_given_up(
    checker: VllmChecker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(checker) == (16, 0, "")
    monkeypatch.setattr("raytune_autotuner.engine.vllm_checker.CHECK_TIMEOUT_S", 0.2)
    monkeypatch.setattr("raytune_autotuner.engine.vllm_checker._CLOSING_S", 0.2)
    lost = Process.of(pid(checker))
    assert ask(checker, "--act", "hang") is None
    assert "no answer within 0 s" in caplog.text
    assert lost is not None
    assert not lost.alive


@pytest.mark.parametrize(("python", "told"), [("/no/such/python", "No such file"), (sys.executable, "No module named")])
def test_an_engine_that_cannot_be_asked_is_told_with_its_last_words(tmp_path: Path, python: str, told: str) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    with (
        VllmChecker(python, {"PYTHONPATH": str(tmp_path)}) as checker,
        pytest.raises(ConfigError, match=f"does not answer which flags it has: .*{told}"),
    ):
        checker.examine({"model": "m", "args": [], "candidates": []})


def test_closing_waits_for_the_end_also_in_the_middle_of_an_import(environment: dict[str, str]) -> None:
    checker = VllmChecker(sys.executable, {**environment, "IMPORT_S": "600"})
    checker.start()
    started = Process.of(pid(checker))
    assert started is not None
    time.sleep(0.3)  # until it imports
    checker.close()
    assert not started.alive
    checker.close()


DRIVER = """
import sys
from raytune_autotuner.engine.vllm_checker import VllmChecker
checker = VllmChecker(sys.executable, {})
checker.start()
print(checker._process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("import_s", ["0", "600"])
def test_the_process_does_not_outlive_a_driver_that_is_killed(environment: dict[str, str], import_s: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        env={**os.environ, "PYTHONPATH": f"{environment['PYTHONPATH']}:{Path.cwd()}", "IMPORT_S": import_s},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as driver:
        assert driver.stdout is not None
        process = Process.of(int(driver.stdout.readline()))
        assert process is not None
        time.sleep(0.3)  # until it imports, or has done so
        assert process.alive
        driver.kill()
    assert ends(process)


def ends(process: Process) -> bool:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if not process.alive:
            return True
        time.sleep(0.02)
    return False


def simulated(**args: Any) -> SimulatedEngine:
    changes = {"engine": {"kind": "simulated", "args": args}}
    return SimulatedEngine(parse_study(merged(BASE, changes)))


@pytest.mark.parametrize(
    ("params", "stage", "kind", "told"),
    [
        ({"tensor-parallel-size": 3}, Stage.CONFIGURATION, Kind.INVALID_CONFIG, "attention heads (32)"),
        (
            {"max-num-seqs": 64, "max-num-batched-tokens": 8},
            Stage.CONFIGURATION,
            Kind.INVALID_CONFIG,
            "max_num_batched_tokens (8)",
        ),
        (
            {"enable-chunked-prefill": False, "max-num-batched-tokens": 512},
            Stage.CONFIGURATION,
            Kind.INVALID_CONFIG,
            "smaller than max_model_len",
        ),
        ({"dtype": "float8"}, Stage.ARGUMENTS, Kind.BAD_ARGUMENT, "invalid choice: 'float8'"),
        ({"max-num-seqs": "many"}, Stage.ARGUMENTS, Kind.BAD_ARGUMENT, "--max-num-seqs"),
        ({"quantization": "awq"}, Stage.CONFIGURATION, Kind.UNSUPPORTED, "awq"),
    ],
)
def test_the_simulated_engine_refuses_what_its_start_would(
    params: dict[str, Any], stage: Stage, kind: Kind, told: str
) -> None:
    failure = simulated().refuse(params)
    assert failure is not None
    assert (failure.stage, failure.kind, failure.blame) == (stage, kind, Blame.PARAMETERS)
    assert told in failure.evidence
    assert failure.remedy


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"max-num-seqs": 8, "block-size": 16},
        {"block-size": 7},  # fails later: only a start shows it
        {"gpu-memory-utilization": 1.0},
        {"enforce-eager": None, "env:ANY": 1},
    ],
    ids=str,
)
def test_the_simulated_engine_refuses_nothing_that_only_a_start_shows(params: dict[str, Any]) -> None:
    assert simulated().refuse(params) is None


def test_a_fault_that_is_put_in_on_purpose_is_not_foreseen() -> None:
    engine = simulated(fault="refuse@configuration")
    assert engine.refuse({"max-num-seqs": 8}) is None
    engine.close()


def test_the_simulated_engine_refuses_with_the_words_of_its_log() -> None:
    engine, params = simulated(), {"tensor-parallel-size": 3}
    launch = engine.launch(params, 20_000)
    done = subprocess.run(launch.argv, capture_output=True, text=True, timeout=60, check=False)
    logged = refusal((done.stdout + done.stderr).splitlines(), done.returncode, engine.rules)
    foreseen = engine.refuse(params)
    assert logged is not None
    assert foreseen is not None
    assert (logged.stage, logged.kind, logged.remedy) == (foreseen.stage, foreseen.kind, foreseen.remedy)
    assert foreseen.evidence.partition(": ")[2] in logged.evidence


def test_what_vllm_said_under_other_variables_is_not_taken_for_its_word(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Path(environment["PYTHONPATH"], "vllm-0.dist-info", "METADATA")
    known.parent.mkdir()
    known.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0\n")
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    python = tmp_path / "python"  # of its own, as what is installed is asked once for each
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for variables, told in ({"NEEDED": "1"}, None), ({}, "NEEDED is not set"):
        engine = {"kind": "vllm", "python": str(python), "args": {"act": "need"}, "env": variables, "trust_code": True}
        study = {"study": "s", "model": "org/x", "engine": engine, "search_space": {"max-num-seqs": {"int": [1, 4]}}}
        with closing(VllmEngine(parse_study(study))) as vllm, _refused(told):
            vllm.preflight()


def _refused(told: str | None) -> AbstractContextManager[object]:
    return nullcontext() if told is None else pytest.raises(ConfigError, match=told)


def test_a_variable_without_a_value_is_left_out() -> None:
    assert environment_of({"env:A": None, "env:B": 2.0, "seed": 1}) == {"B": "2"}
