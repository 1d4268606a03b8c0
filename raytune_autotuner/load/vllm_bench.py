"""vLLM's own `bench serve` as the load client, in place of `client`: the same requests in, the same records out.

It runs as a process in the engine's Python (`bench_serve.py`), which ends with its caller, and at the deadline. What it
is known to get wrong is put right here: requests that failed are zeros in its result, it ends with exit code 0 when all
of them did, an answer that is too short counts as a good one, its warm-up repeats one prompt (so it is left out: a
warm-up is a load of its own), and it has no deadline. What it cannot give are records of a load that was not finished,
and its lag.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Required, TypedDict, Unpack

import numpy as np

from raytune_autotuner.load.client import LoadRun, OnProgress
from raytune_autotuner.load.stream import short
from raytune_autotuner.load.trouble import Clocks
from raytune_autotuner.load.workload import Level, Request
from raytune_autotuner.score.records import RequestRecord
from raytune_autotuner.study.errors import AutotunerError, ConfigError

_SCRIPT = Path(__file__).with_name("bench_serve.py")
_OUTPUT = "output"
_LOOK_S = 0.5
_POLL_S = 0.05
_CHECK_TIMEOUT_S = 60
_TAIL_BYTES = 4_000
# Its HTTP client would take a proxy for a server on loopback, and send a key along.
_NOT_PASSED = {"http_proxy", "https_proxy", "all_proxy", "openai_api_key"}
_ADDED = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
_HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


class BenchFailed(AutotunerError):
    """`bench serve` ended without a result; the text has the last lines that it wrote."""


def require(python: str) -> None:
    """Raise `ConfigError` where `python` has no vLLM, whose `bench serve` is to send the load."""
    try:
        done = subprocess.run(
            [python, "-c", _HAS_VLLM], cwd=os.sep, capture_output=True, timeout=_CHECK_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"engine.python: {python!r} does not run as a Python: {error}.") from error
    if done.returncode != 0:
        raise ConfigError(
            f"workload.client: vllm-bench is vLLM's own `bench serve`, but {python} has no vLLM.\n"
            "Name a Python that has it in engine.python, or leave workload.client out."
        )


def measure(
    base_url: str,
    model: str,
    requests: Sequence[Request],
    level: Level,
    *,
    python: str,
    environment: Mapping[str, str] | None = None,
    **options: Unpack[Options],
) -> LoadRun:
    """One load by a `BenchServe` of its own; see there."""
    with BenchServe(python, environment) as bench:
        return bench.measure(base_url, model, requests, level, **options)


class Options(TypedDict, total=False):
    """What a load may be given, as `client.run` has it."""

    deadline: Required[float]
    on_progress: OnProgress | None
    check: Callable[[], None] | None
    keep: list[RequestRecord] | None


class BenchServe:
    """The `bench serve` of a Python's vLLM, which is imported by the first load and kept for the next ones.

    `environment` is added to the process's own: a trial's mark belongs there. The process ends with the block, and with
    the thread that sent the first load.
    """

    def __init__(self, python: str, environment: Mapping[str, str] | None = None) -> None:
        self._python = python
        self._environment = {**_environment(), **(environment or {})}
        self._process: subprocess.Popen[str] | None = None
        self._loads = 0

    def __enter__(self) -> BenchServe:
        self._temporary = tempfile.TemporaryDirectory(prefix="bench-serve-", dir=self._environment.get("TMPDIR"))
        self._folder = Path(self._temporary.name)
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._temporary.cleanup()

    def measure(
        self,
        base_url: str,
        model: str,
        requests: Sequence[Request],
        level: Level,
        **options: Unpack[Options],
    ) -> LoadRun:
        """Send `requests` at `level`; what is not said here is as `client.run` has it.

        At the deadline there are no records, because it writes them at its end. Raises `BenchFailed`.
        """
        job = _Job(self._folder, self._loads, len(requests), options)
        self._loads += 1
        job.write(_options(base_url, model, level, job.written), requests)
        clocks = Clocks.now()
        try:
            result = job.run(self._running())
        finally:
            if not job.answered:
                self._end()  # the load is not to go on
        run = _load_run(result, requests, level, job.cpu, clocks)
        job.tell(run)
        return run

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            with (self._folder / _OUTPUT).open("wb") as output:
                self._process = subprocess.Popen(
                    # As text: run as a file, its folder would stand first on the path.
                    [self._python, "-c", _SCRIPT.read_text(encoding="utf-8"), str(os.getpid())],
                    cwd=os.sep,
                    env=self._environment,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    text=True,
                )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: nothing that it started is missed
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


class _Job:
    """One load of a `bench serve` process, and what is seen of it from outside."""

    def __init__(self, folder: Path, number: int, total: int, options: Options) -> None:
        self.written = folder / f"written-{number}.json"
        self.cpu: list[tuple[float, float]] = []
        """(monotonic seconds, CPU seconds of the process so far), all along."""
        self.answered = False
        self._question = folder / f"question-{number}.json"
        self._result = folder / f"result-{number}.json"
        self._output = folder / _OUTPUT
        self._total = total
        self._options = options

    def write(self, options: list[str], requests: Sequence[Request]) -> None:
        """Write down what is to be sent."""
        asked = [[request.prompt, _tokens_in(request), request.tokens_out, request.scheduled_s] for request in requests]
        job = {"options": options, "requests": asked, "result": str(self._result)}
        self._question.write_text(json.dumps(job), encoding="utf-8")

    def run(self, process: subprocess.Popen[str]) -> dict[str, Any] | None:
        """Have it sent, looking twice a second; the result, or None where the deadline came first.

        Raises `BenchFailed` where the process ended, and what the load's `check` raises.
        """
        self._said = self._output.stat().st_size
        with suppress(BrokenPipeError):  # that it has ended is seen below
            print(self._question, file=process.stdin, flush=True)
        look = 0.0
        while not self._result.is_file():
            if process.poll() is not None:
                raise BenchFailed(self._last_words(process.returncode))
            now = time.monotonic()
            if now >= self._options["deadline"]:
                return None
            self._note_cpu(process.pid)
            if now >= look:
                look = now + _LOOK_S
                self._look()
            time.sleep(_POLL_S)
        self._note_cpu(process.pid)
        self.answered = True
        result: dict[str, Any] = json.loads(self._result.read_text(encoding="utf-8"))
        return result

    def tell(self, run: LoadRun) -> None:
        """Tell of the end, and hand on the records."""
        if on_progress := self._options.get("on_progress"):
            on_progress(len(run.records), run.requests, sum(not record.ok for record in run.records))
        keep = self._options.get("keep")
        if keep is not None:
            keep.extend(sorted(run.records, key=lambda record: record.end_s))

    def _look(self) -> None:
        if on_progress := self._options.get("on_progress"):
            # Its bar is the one thing that tells how many requests have ended, failed ones among them.
            bars = re.findall(rf"(\d+)/{self._total} \[", self._tail())
            on_progress(int(bars[-1]) if bars else 0, self._total, 0)
        if check := self._options.get("check"):
            check()

    def _note_cpu(self, pid: int) -> None:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        self.cpu.append((time.monotonic(), ticks / os.sysconf("SC_CLK_TCK")))

    def _tail(self) -> str:
        """The end of what it wrote in this load."""
        with self._output.open("rb") as file:
            file.seek(max(self._output.stat().st_size - _TAIL_BYTES, self._said))
            return file.read().decode(errors="replace")

    def _last_words(self, exit_code: int) -> str:
        lines = [line.strip() for line in self._tail().splitlines() if line.strip()]
        said = " / ".join(lines[-3:]) or "no output"
        return f"vLLM's bench serve ended with exit code {exit_code} and no result: {said}"


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.lower() not in _NOT_PASSED} | _ADDED


def _tokens_in(request: Request) -> int:
    """What is told of the prompt's length, until the server has counted."""
    return 1 if isinstance(request.prompt, str) else len(request.prompt)


def _options(base_url: str, model: str, level: Level, result: Path) -> list[str]:
    # The two kinds of data set stand for nothing but who decides on the times at which requests are sent.
    loop = (
        ["--dataset-name", "timed_trace"]
        if level.open_loop
        else ["--dataset-name", "custom", "--max-concurrency", str(level.concurrency or 1)]
    )
    return [
        *("--backend", "vllm", "--base-url", base_url, "--endpoint", "/v1/completions", "--model", model),
        *("--skip-tokenizer-init", "--ignore-eos", "--temperature", "0"),
        *("--num-warmups", "0", "--ready-check-timeout-sec", "0"),
        *("--save-result", "--save-detailed", "--result-dir", str(result.parent), "--result-filename", result.name),
        *loop,
    ]


def _load_run(
    result: Mapping[str, Any] | None,
    requests: Sequence[Request],
    level: Level,
    cpu: Sequence[tuple[float, float]],
    clocks: Clocks,
) -> LoadRun:
    jump_s = clocks.jump_s(Clocks.now())
    if result is None:
        return LoadRun((), len(requests), False, clocks.wall_s, 0.0, clock_jump_s=jump_s)
    start = _start(result["start_times"], requests)
    records = tuple(_record(result, index, request, level, start) for index, request in enumerate(requests))
    share = _cpu_share(cpu, start, max(record.end_s for record in records))
    started_at = clocks.wall_s + start - clocks.monotonic_s
    return LoadRun(records, len(requests), True, started_at, share, clock_jump_s=jump_s)


def _start(start_times: Sequence[float], requests: Sequence[Request]) -> float:
    """When the load began: the moment from which the least late request was sent exactly when it was due."""
    return min(sent - request.scheduled_s for sent, request in zip(start_times, requests, strict=True))


def _record(result: Mapping[str, Any], index: int, request: Request, level: Level, start: float) -> RequestRecord:
    sent_s = result["start_times"][index] - start
    times_s = _token_times_s(result, index, sent_s)
    failed_s = max(float(result["duration"]), sent_s)  # it does not tell when: by the load's end at the latest
    tokens_out = int(result["output_lens"][index])
    return RequestRecord(
        index=request.index,
        level=level.label,
        round=request.round,
        phase=request.phase,
        scheduled_s=request.scheduled_s if level.open_loop else sent_s,
        sent_s=sent_s,
        first_token_s=times_s[0] if times_s else None,
        end_s=times_s[-1] if times_s and not result["errors"][index] else failed_s,
        token_times_s=times_s,
        tokens_in=int(result["input_lens"][index]) if times_s else None,
        tokens_out=tokens_out if times_s else None,
        tokens_out_wanted=request.tokens_out,
        error=_error(result["errors"][index], times_s, tokens_out, request.tokens_out),
    )


def _token_times_s(result: Mapping[str, Any], index: int, sent_s: float) -> tuple[float, ...]:
    ttft_s = float(result["ttfts"][index])
    return tuple(accumulate(result["itls"][index], initial=sent_s + ttft_s)) if ttft_s > 0 else ()


def _error(said: str, times_s: Sequence[float], tokens_out: int, wanted: int) -> str | None:
    """Why the request failed: what `bench serve` caught, or what it let pass."""
    if lines := said.strip().splitlines():
        return short(lines[-1])  # of a traceback the last line says what it was
    if not times_s:
        return "no token arrived"
    if tokens_out != wanted:
        return f"{wanted} output tokens wanted, {tokens_out} answered"
    return None


def _cpu_share(cpu: Sequence[tuple[float, float]], start: float, duration_s: float) -> float:
    """CPU seconds of the process per second of load, its start-up left out."""
    if not cpu or duration_s <= 0:
        return 0.0
    at_s, used_s = zip(*cpu, strict=True)
    begun, ended = np.interp([start, start + duration_s], at_s, used_s)
    return float(ended - begun) / duration_s
