from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from raytune_autotuner.report.events import Events
from raytune_autotuner.report.status import LiveTrial, StudyStatus, write_status
from raytune_autotuner.report.table import differing, trial_table
from raytune_autotuner.report.terminal import (
    Ending,
    EventLines,
    StudyInfo,
    comparison_lines,
    follow,
    make_watcher,
)
from raytune_autotuner.report.verdict import study_verdict, verdict
from raytune_autotuner.study.failure import Stage
from raytune_autotuner.study.masking import assignment
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialRow
from tests.report_samples import (
    METRIC,
    again,
    failed,
    make_study,
    measured,
    running,
    sample_rows,
    setting,
    verified_rows,
)
from tests.study_folders import make_folder

TWO = {"maximize": METRIC, "minimize": "ttft_ms_p90"}
LINE = "HF_HUB_OFFLINE=1 " + "python -m engine --flag value " * 12 + "--end"
LIVE = {4: LiveTrial(4, Stage.WEIGHTS, 0.4, 21.0, 600.0)}


def info(study: Study | None = None) -> StudyInfo:
    notes = ("simulated 1.0",)
    return StudyInfo(study or make_study(), Path("/r/sample run"), 2, "http://127.0.0.1:8265", "log in so", notes)


def ending(rows: Sequence[TrialRow] | None = None) -> Ending:
    rows = sample_rows() if rows is None else rows
    return Ending(verdict(rows, "maximize", METRIC, make_study().fixed), rows, (LINE, "vllm serve m"))


def drawn(rows: Sequence[TrialRow], width: int, height: int | None = None, best: int | None = 2) -> list[str]:
    console = Console(width=width, file=io.StringIO(), highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(trial_table(make_study(), rows, LIVE, width, height, best))
    return capture.get().splitlines()


def two_objectives() -> list[TrialRow]:
    rows = [replace(row, scores=(row.score or 0.0, 50.0 + row.number % 3)) for row in verified_rows()]
    return [replace(row, result=replace(row.result, metrics={"ttft_ms_p90": row.scores[1]})) for row in rows]


# A line an event


def events(steps: Sequence[tuple[Sequence[TrialRow], dict[int, LiveTrial]]], verbose: bool = False) -> list[str]:
    told = Events(make_study(), verbose)
    return [str(event) for rows, live in steps for event in told.since(rows, live)]


def test_a_trials_life_is_told_event_by_event_and_each_once() -> None:
    row = running(1, setting(8))
    steps: list[tuple[list[TrialRow], dict[int, LiveTrial]]] = [
        ([replace(row, state=State.PENDING)], {}),
        ([row], {}),
        ([row], {1: LiveTrial(1, Stage.WEIGHTS, 0.5, 20.0, 600.0)}),
        ([row], {1: LiveTrial(1, Stage.WARMUP, 0.5, 43.21, 600.0)}),
        ([row], {1: LiveTrial(1, Stage.LOAD, 0.5, 50.0, 600.0)}),
        ([measured(1, 143.0, setting(8))], {}),
        ([measured(1, 143.0, setting(8))], {}),
    ]
    params = "{max-num-seqs: 8, block-size: 32, enable-prefix-caching: true, env:VLLM_CPU_OMP_THREADS_BIND: auto}"
    assert events(steps) == [
        f"trial 1 started {params}",
        "trial 1 ready in 43.2 s",
        f"trial 1 measured {METRIC} 143 (x1.43 of baseline), best so far",
    ]


def test_a_trial_that_came_and_went_between_two_looks_is_told_whole() -> None:
    told = events([([measured(0, 100.0)], {})])
    assert [line.split()[2] for line in told] == ["started:", "ready", "measured"]


def test_a_failure_is_told_with_stage_kind_penalty_and_evidence() -> None:
    line = events([([failed(7, setting(8))], {})])[-1]
    assert line == (
        "trial 7 failed at kv-cache: out-of-memory, penalty 1.45, elapsed 45.3 s / 600 s: "
        'ValueError: 12.3 GiB is needed, "quoted", and a comma'
    )


def test_more_is_told_on_request() -> None:
    row = running(1, setting(8))
    steps: list[tuple[list[TrialRow], dict[int, LiveTrial]]] = [
        ([row], {1: LiveTrial(1, Stage.WEIGHTS, 0.5, 20.0, 600.0)}),
        ([failed(1, setting(8))], {}),
    ]
    told = events(steps, verbose=True)
    assert "trial 1 reached weights after 20.0 s" in told
    assert told[-1].endswith("| Lower gpu-memory-utilization.")


def test_a_missed_slo_is_told_and_is_never_the_best() -> None:
    line = events([([measured(3, 160.0, setting(8), violation=0.27)], {})])[-1]
    assert line.endswith("misses an SLO (violation 0.27)")


def test_a_lost_trial_and_its_retry_are_told() -> None:
    lost = replace(failed(1, setting(8)), state=State.LOST, penalty=None)
    told = events([([lost, replace(running(2, setting(8)), retry_of=1)], {})])
    assert "trial 1 lost at kv-cache: out-of-memory, elapsed 45.3 s / 600 s" in told[1]
    assert "trial 2 started again (was trial 1)" in told[2]


def test_a_restart_is_told_by_what_it_verifies_and_is_never_the_best() -> None:
    rows = verified_rows()
    told = events([(rows, {})])
    assert "trial 5 started: verify trial 2, 1 of 5" in told
    assert f"trial 5 measured {METRIC} 140 (verify trial 2, 1 of 5)" in told
    assert [line.split()[1] for line in told if "best so far" in line] == ["0", "2"]  # none of the restarts
    failure = events([([again(9, rows[1], 2)], {})])[-1]
    assert failure.startswith("trial 9 failed (verify trial 2, 3 of 5) at kv-cache: out-of-memory")


def test_a_trial_that_could_not_win_is_told_by_what_it_could_have_come_to() -> None:
    row = replace(measured(3, 1.0, setting(8)), state=State.STOPPED, score=None, violation=None, bound=97.0)
    assert events([([row], {})])[-1] == f"trial 3 stopped after 70.0 s: {METRIC} could come to 97 at best"


def test_every_objective_is_told() -> None:
    study = make_study(objective=TWO)
    line = str(Events(study).since([replace(measured(0, 100.0), scores=(100.0, 50.0))], {})[-1])
    assert line == f"trial 0 measured {METRIC} 100, ttft_ms_p90 50 (baseline), best so far in the first"


def test_without_a_terminal_there_are_no_control_codes(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    with path.open("w") as stream:
        watcher = make_watcher(stream=stream)
        assert isinstance(watcher, EventLines)
        watcher.started(info())
        watcher.update(sample_rows(), LIVE)
        assert "trial 2 measured" in path.read_text()  # written at once
        watcher.finished(ending())
        watcher.close()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", path.read_text())


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"])
def test_no_variable_brings_control_codes_into_a_file(variable: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(tests=str(Path(__file__).parent), wait=0)],
        env={**os.environ, variable: "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "trial 2 measured" in run.stdout
    assert "\x1b" not in run.stdout


def test_a_study_that_runs_elsewhere_is_followed_to_its_end(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, sample_rows()[:2], phase="running")
    stream = io.StringIO()

    def go_on() -> None:
        folder.write_rows(sample_rows())
        write_status(folder, replace(StudyStatus.begin(1), phase="finished"))

    later = threading.Timer(0.3, go_on)
    later.start()
    follow(folder, EventLines(stream))
    later.join()
    assert f"results: {folder.path}" in stream.getvalue()
    assert "trial 2 measured" in stream.getvalue()


# The end


def ended(rows: Sequence[TrialRow] | None = None, the_end: Ending | None = None) -> str:
    stream = io.StringIO()
    watcher = EventLines(stream)
    watcher.started(info())
    watcher.finished(the_end or ending(rows))
    return stream.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_launch_line_stands_alone_and_whole_at_any_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = ended().splitlines()
    assert LINE in lines
    assert lines[lines.index(LINE) - 1] == "serve it here:"
    assert lines[-1] == "vllm serve m"


def test_a_launch_line_shows_no_secret() -> None:
    text = ended(the_end=replace(ending(), launch=(f"{assignment('HF_TOKEN', 'hf_0123456789abc')} vllm serve m", "")))
    assert "hf_0123456789abc" not in text
    assert 'HF_TOKEN="$HF_TOKEN" vllm serve m' in text


def test_the_end_says_what_won_what_changed_what_failed_and_where_it_is() -> None:
    text = ended()
    assert "Run trial 2: output_throughput_tok_s 143 against 100 with the defaults, 43 % better" in text
    assert re.search(r"max-num-seqs +16 +\(was the engine's default\)", text)
    assert "max-model-len" not in text.split("changed against")[1].split("failures")[0]
    assert "out-of-memory x1 (trial 1): Lower gpu-memory-utilization." in text
    assert "tensorboard --logdir '/r/sample run'" in text


def test_the_end_shows_what_was_measured_again() -> None:
    text = ended(verified_rows())
    assert "40.0 % better (95 % interval +38.7 to +41.3 %), 5 restarts each, noise 2.2 %." in text
    lines = text.splitlines()
    start = lines.index(f"measured again: {METRIC}")
    assert [" ".join(line.split()) for line in lines[start + 1 : start + 5]] == [
        "setting mean spread gain 95 % interval",
        "defaults 100 2.2 % - -",
        "trial 2 140 2.0 % +40.0 % +38.7 to +41.3 %",
        "trial 3 120 2.0 % +20.0 % +18.6 to +21.4 %",
    ]


@pytest.mark.parametrize("width", [30, 45, 60, 120])
def test_the_table_of_what_was_measured_again_fits_and_keeps_the_interval(width: int) -> None:
    answer = study_verdict(make_study(objective=TWO), two_objectives())
    lines = comparison_lines(answer, width)
    assert max(map(len, lines)) <= width or width == 30
    assert "95 % interval" in lines[1]
    assert ("spread" in lines[1]) == (width == 120)


def test_a_machine_too_noisy_to_decide_is_warned_of_at_the_end() -> None:
    answer = replace(verdict(verified_rows(), "maximize", METRIC), warning="Too noisy.")
    assert "\nToo noisy.\n" in ended(the_end=Ending(answer, verified_rows()))


def test_where_the_defaults_win_nothing_is_said_to_have_changed() -> None:
    text = ended(rows=[measured(0, 100.0), measured(1, 90.0, setting(8))])
    assert "Keep the defaults" in text
    assert "changed against" not in text


def test_where_nothing_was_measured_there_is_no_launch_line() -> None:
    rows = [failed(0), failed(1, setting(8))]
    text = ended(the_end=replace(ending(rows), launch=None))
    assert "Nothing was measured: all 2 trials failed" in text
    assert "serve it here" not in text


def test_an_interrupted_study_says_so_and_still_answers() -> None:
    text = ended(the_end=replace(ending(), interrupted=True))
    assert "Interrupted: the engines are stopped; what was measured is kept." in text
    assert "Run trial 2" in text


# The table


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_table_fits_the_width_and_keeps_what_matters(width: int) -> None:
    lines = drawn(sample_rows(), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for cell in ("0 baseline", "out-of-memory", "misses SLO 0.27", "weights 40%", "x1.43", "143", "1.45"):
        assert cell in text


def test_a_wide_table_has_every_parameter_and_metric() -> None:
    header = "\n".join(drawn(sample_rows(), 200)[:5])
    for piece in ("num-", "block-", "prefix-", "env:VLLM_", "ttft_", "penalty", "failed", "time"):
        assert piece in header


def test_only_parameters_that_differ_have_a_column() -> None:
    rows = [measured(1, 1.0, {"a": 1, "b": 2}), measured(2, 1.0, {"a": 1, "b": 3})]
    assert differing(rows) == ["b"]
    assert differing([measured(0, 1.0), *rows]) == ["a", "b"]


def test_penalty_and_score_are_columns_of_their_own() -> None:
    lines = drawn(sample_rows(), 80)
    failure = next(line for line in lines if "out-of-memory" in line)
    winner = next(line for line in lines if "143" in line)
    assert failure.rstrip().endswith("1.45  45 s")
    assert "1.45" not in winner
    assert not any("penalty" in line for line in drawn([measured(0, 100.0)], 80))


@pytest.mark.parametrize("height", [8, 14, 30])
def test_many_trials_are_cut_to_the_height_with_running_best_and_newest(height: int) -> None:
    rows = [measured(i, 100.0 + (i == 2), setting(1 + i % 64)) for i in range(100)]
    rows[4] = running(4, setting(8))
    lines = drawn(rows, 100, height)
    assert len(lines) <= height
    numbers = [int(line.split()[0]) for line in lines if line[:1].isdigit()]
    assert {2, 4} <= set(numbers)
    assert height < 14 or 99 in numbers
    assert numbers == sorted(numbers)
    assert f"{100 - len(numbers)} more trials not shown" in lines[-1]


def test_text_from_an_engine_is_no_markup() -> None:
    rows = [measured(1, 1.0, {"x": "[red]a[/red]"}), measured(2, 1.0, {"x": ":smile:"})]
    text = "\n".join(drawn(rows, 120))
    assert "[red]a[/red]" in text
    assert ":smile:" in text


@pytest.mark.parametrize(("width", "cell"), [(60, "8 verify 2, 2/5"), (120, "8 verify trial 2, 2 of 5")])
def test_a_restart_stands_in_the_table_with_what_it_verifies(width: int, cell: str) -> None:
    lines = drawn(verified_rows(), width)
    assert max(map(len, lines)) <= width
    assert any(line.startswith(cell) for line in lines)


def test_while_restarts_fill_the_table_the_finalists_stay_in_it() -> None:
    lines = drawn(verified_rows(), 80, 10, best=2)
    assert [line.split()[0] for line in lines if line[:1].isdigit()][:3] == ["0", "2", "3"]


def test_every_objective_is_a_column_also_where_there_is_little_room() -> None:
    study, console = make_study(objective=TWO), Console(width=70, file=io.StringIO())
    with console.capture() as capture:
        console.print(trial_table(study, two_objectives(), {}, 70, None, None))
    assert re.search(r"ttft_", capture.get())
    assert "higher is better; ttft_ms_p90, lower" in capture.get()


def test_an_empty_study_can_be_drawn() -> None:
    assert "state" in "".join(drawn([], 80))


# A real terminal

PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
from test_terminal import LIVE, ending, info
from tests.report_samples import sample_rows
from raytune_autotuner.report.terminal import make_watcher
watcher = make_watcher()
try:
    watcher.started(info())
    watcher.update(sample_rows(), LIVE)
    print("a line from elsewhere")
    time.sleep({wait})
    watcher.finished(ending())
finally:
    watcher.close()
"""


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, columns: int, wait: float, **env: str) -> None:
        self._main, self.side = pty.openpty()
        fcntl.ioctl(self.side, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        self.before = termios.tcgetattr(self.side)
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        program = PROGRAM.format(tests=str(Path(__file__).parent), wait=wait)
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=self.side,
            stdout=self.side,
            stderr=self.side,
            env={**environment, "TERM": "xterm-256color", **env},
        )
        self.output = ""

    def read_until(self, text: str = "", timeout_s: float = 30.0) -> None:
        """Read until `text` is there, or without it until the program has ended and all is read."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            ready, _, _ = select.select([self._main], [], [], 0.05)
            if ready:
                self.output += os.read(self._main, 65536).decode("utf-8", "replace")
            elif not text and self.process.poll() is not None:
                return
            if text and text in self.output:
                return
        raise AssertionError(f"{text!r} did not come in {timeout_s} s: {self.output[-2000:]!r}")

    def is_sane(self) -> bool:
        """Whether the cursor is shown, colours are off and the terminal's settings are those from before."""
        shown = self.output.rfind("\x1b[?25h") >= self.output.rfind("\x1b[?25l")
        return shown and termios.tcgetattr(self.side) == self.before and "\x1b[?1049h" not in self.output

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main)
        os.close(self.side)


@pytest.mark.parametrize("columns", [60, 200])
def test_on_a_terminal_the_table_is_live_and_leaves_the_terminal_sane(columns: int) -> None:
    terminal = Terminal(columns, wait=1.0)
    try:
        terminal.read_until()
        assert terminal.process.returncode == 0
        live, _, after = terminal.output.rpartition("\x1b[?25h")
        assert "weights 40%" in live
        assert live.count("0 baseline") >= 2  # drawn anew
        assert "a line from elsewhere" in live
        assert LINE in after.splitlines()
        assert terminal.is_sane()
    finally:
        terminal.close()


def test_ctrl_c_leaves_the_terminal_sane() -> None:
    terminal = Terminal(80, wait=60.0)
    try:
        terminal.read_until("weights 40%")
        terminal.process.send_signal(signal.SIGINT)
        terminal.read_until()
        assert terminal.is_sane()
    finally:
        terminal.close()


def test_no_color_is_honoured() -> None:
    terminal = Terminal(80, wait=0.3, NO_COLOR="1")
    try:
        terminal.read_until()
        assert not re.search(r"\x1b\[[0-9;]*[34][0-9][0-9;]*m", terminal.output)
        assert "weights 40%" in terminal.output
    finally:
        terminal.close()


def test_a_terminal_without_control_codes_gets_lines() -> None:
    terminal = Terminal(80, wait=0.0, TERM="dumb")
    try:
        terminal.read_until()
        assert "\x1b" not in terminal.output
        assert "trial 2 measured" in terminal.output
    finally:
        terminal.close()
