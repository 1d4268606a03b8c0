"""Who sends a trial's loads: the built-in client, by as many processes as it needs, or vLLM's `bench serve`.

In: requests and the level at which they are sent. Out: the load as it went. It does not judge it, and of the engine it
knows the base URL.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Unpack

from raytune_autotuner.engine.processes import MARK_VARIABLE
from raytune_autotuner.engine.scratch import Scratch
from raytune_autotuner.load.client import LoadRun
from raytune_autotuner.load.dialect import Dialect
from raytune_autotuner.load.spread import Clients, most_processes
from raytune_autotuner.load.trouble import processes_wanted
from raytune_autotuner.load.vllm_bench import BenchServe, Options
from raytune_autotuner.load.workload import Level, Request
from raytune_autotuner.score.records import Phase
from raytune_autotuner.study.study import Study


class Sender:
    """The clients of one trial, whose processes bear its `mark`; they end with the block, or when it is closed."""

    def __init__(self, study: Study, mark: str) -> None:
        self._study = study
        self._mark = mark
        asked = study.workload.client_processes
        self.processes = 1 if asked == "auto" else asked
        """How many processes of the built-in client send a load, where it can be divided among so many."""
        self._dialect = Dialect.of(study.engine)
        self._bench: BenchServe | None = None
        self._until_the_end = ExitStack()

    def __enter__(self) -> Sender:
        self._clients = self._until_the_end.enter_context(Clients())
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all client processes."""
        self._until_the_end.close()

    def start(self) -> None:
        """Have them running before the first load. Raises `ClientLost`."""
        self._clients.start(self.processes)

    def send(
        self,
        base_url: str,
        model: str,
        requests: Sequence[Request],
        level: Level,
        phase: Phase,
        **options: Unpack[Options],
    ) -> LoadRun:
        """Send one load; what is not said here is as `client.run` has it. Raises `ClientLost` and `BenchFailed`.

        A warm-up is always the built-in client's, since `bench serve` takes 15 s to import.
        """
        if phase == "measure" and self._study.workload.client == "vllm-bench":
            return self._bench_serve().measure(base_url, model, requests, level, **options)
        return self._clients.measure(
            base_url, model, requests, level, processes=self.processes, dialect=self._dialect, **options
        )

    def grow(self, load: LoadRun, level: Level) -> bool:
        """Whether this load had too few processes and can have more, which are there for all loads to come."""
        workload = self._study.workload
        if workload.client != "builtin" or workload.client_processes != "auto":
            return False
        possible = min(len(os.sched_getaffinity(0)), most_processes(level, load.requests))
        wanted = min(processes_wanted(load.client_cpu_share, load.processes, load.duration_s), possible)
        if wanted <= load.processes:
            return False
        self.processes = max(self.processes, wanted)
        self.start()
        return True

    def _bench_serve(self) -> BenchServe:
        if self._bench is None:
            scratch = self._until_the_end.enter_context(Scratch(os.environ))
            own = {MARK_VARIABLE: self._mark, **scratch.variables}
            python = str(self._study.engine.python or sys.executable)
            self._bench = self._until_the_end.enter_context(BenchServe(python, own))
        return self._bench
