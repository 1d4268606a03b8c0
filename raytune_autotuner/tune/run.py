"""A study from its file to its verdict: checks, cluster, search, results."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, TuneError, Tuner
from ray.tune.execution import class_cache

from raytune_autotuner.engine.contract import Engine
from raytune_autotuner.engine.processes import sweep_orphans
from raytune_autotuner.report.best import write_best
from raytune_autotuner.report.events import Events
from raytune_autotuner.report.html.page import write_report
from raytune_autotuner.report.logs import LogWriter
from raytune_autotuner.report.mirror import Mirror
from raytune_autotuner.report.progress import time_left_s
from raytune_autotuner.report.recheck import Claim, Recheck, answer_of, claim_notes, note_claim
from raytune_autotuner.report.results import SUGGESTION, ResultsFolder
from raytune_autotuner.report.runs import create_run
from raytune_autotuner.report.sparing import Sparing
from raytune_autotuner.report.status import LiveTrial, Phase, StudyStatus, write_status
from raytune_autotuner.report.store import Store
from raytune_autotuner.report.tensorboard import TensorBoardWriter
from raytune_autotuner.report.terminal import Ending, StudyInfo, Watcher, make_watcher
from raytune_autotuner.report.verdict import Verdict
from raytune_autotuner.report.wording import describe_params
from raytune_autotuner.report.writing import cut_half_line
from raytune_autotuner.study.errors import INTERRUPTED, NO_RESULT, OK, AutotunerError, ConfigError, StudyError
from raytune_autotuner.study.masking import is_secret, learn
from raytune_autotuner.study.space import Params
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import BASELINE, State, TrialRow
from raytune_autotuner.tune.cache import Cache, read_cache
from raytune_autotuner.tune.callback import StudyCallback
from raytune_autotuner.tune.checks import check_study, quality_notes
from raytune_autotuner.tune.cluster import Cluster, address_of, node_answers, running_cluster
from raytune_autotuner.tune.early_stop import StopHopeless
from raytune_autotuner.tune.engine_there import engine_of
from raytune_autotuner.tune.files import FarFiles
from raytune_autotuner.tune.gauges import Gauges
from raytune_autotuner.tune.head import watched_head
from raytune_autotuner.tune.monitor import TICK_S, start_monitor
from raytune_autotuner.tune.reporter import SCORE, TrialReporter, round_metrics
from raytune_autotuner.tune.resume import check_claim, check_versions, elapsed_before_s, kept_rows, unfinished_run
from raytune_autotuner.tune.samplers import make_sampler
from raytune_autotuner.tune.searcher import StudySearch
from raytune_autotuner.tune.standing import Standing
from raytune_autotuner.tune.stopping import enough
from raytune_autotuner.tune.tell import Teller
from raytune_autotuner.tune.trainable import EngineTrial, Job
from raytune_autotuner.tune.verify import Verifies
from raytune_autotuner.tune.versions import code_state, versions
from raytune_autotuner.tune.warm_start import Learned, learn_from_earlier

logger = logging.getLogger(__name__)
_STOP = (signal.SIGINT, signal.SIGTERM)
LOOK_S = 2.0
"""So often the cluster is asked for its nodes."""
_DUMMY = "the search loads no weights (engine.search_weights); finalists are measured again on the real ones"
ANSWER_S = 5.0
"""The monitor answers in milliseconds; one that does not is lost with its node."""


def run_study(
    study: Study,
    results: Path | Store,
    *,
    resume: bool = False,
    verbose: bool = False,
    trainable: type[EngineTrial] = EngineTrial,
    verifies: Verifies | None = None,
) -> int:
    """Run `study` and leave its folder under `results`; returns the exit code.

    `resume` goes on with the newest unfinished run of the study there. `trainable` is what runs in each trial's actor.
    With `verifies` nothing is searched: the study's one setting and the baseline are measured again.
    Raises `ConfigError` before anything is started where the study cannot run on this machine or cluster.
    """
    learn(study.secrets)
    check_study(study, results)
    before = unfinished_run(study, results) if resume else None
    address = address_of(study, results)
    with ExitStack() as until_all_is_ended:
        joined = until_all_is_ended.enter_context(running_cluster(address)) if address else None
        engine = until_all_is_ended.enter_context(closing(engine_of(study, joined)))
        learned = _prepare(study, engine, before, verifies)
        cluster = joined or until_all_is_ended.enter_context(running_cluster())
        cluster.require(study, engine)
        folder = before or create_run(results, study)
        watcher = make_watcher(verbose)
        resumed = before is not None
        run = _Run(study, engine, cluster, folder, watcher, trainable, learned, resumed, verifies)
        until_all_is_ended.enter_context(run.log)
        if run.mirror is not None:
            until_all_is_ended.enter_context(run.mirror)
        if cluster.joined:
            until_all_is_ended.enter_context(watched_head(run.warn))
        until_all_is_ended.enter_context(_stop_signals(run.interrupt))
        try:
            run.search()
            return run.finish()
        except (OSError, TuneError) as error:
            if (cause := _error_of_a_file(error)) is None:
                raise
            raise StudyError(_cannot_write(folder, cause)) from error
        finally:
            watcher.close()
            run.end_monitor()
            sweep_orphans()


def _prepare(study: Study, engine: Engine, before: ResultsFolder | None, verifies: Verifies | None) -> list[Learned]:
    """The engine's own checks, before the first trial; what `search.warm_start` has to teach."""
    if before is not None:
        check_versions(before, engine.versions())
        check_claim(before, verifies.claim if verifies else None)
    _preflight(engine, verifies)
    sweep_orphans()
    try:
        return learn_from_earlier(study, versions(engine))
    except ConfigError as error:
        if before is None or not before.read_rows():
            raise
        logger.warning("The search goes on without what an earlier study has taught it. %s", error)
        return []


def _preflight(engine: Engine, verifies: Verifies | None) -> None:
    """Raise `ConfigError` where no trial could start; of a setting that is verified, that is the answer."""
    try:
        engine.preflight()
    except ConfigError as error:
        if verifies is None or not str(error).startswith("search_space."):
            raise
        what = f"So {verifies.claim.source} cannot be started here: its gain does not hold."
        raise ConfigError(f"{error}\n{what}") from error


@dataclass
class _Run:
    """One running study: the parts, and what passes between them."""

    study: Study
    engine: Engine
    cluster: Cluster
    folder: ResultsFolder
    watcher: Watcher
    trainable: type[EngineTrial]
    learned: Sequence[Learned] = ()
    resumed: bool = False
    verifies: Verifies | None = None
    begun: float = field(default_factory=time.time)
    standings: dict[str, Standing] = field(default_factory=dict)
    stale: bool = False
    """Whether a trial has ended since Parquet and CSV were written."""

    def __post_init__(self) -> None:
        limits = self.study.trial
        self.slots = self.cluster.slots(self.study, self.engine)
        self._looked_at = time.monotonic()
        self.log = LogWriter(self.folder.study_log)
        self.mirror = None if self.folder.store is None else Mirror(self.folder.path, self.folder.store, self.warn)
        self.events = Events(self.study, verbose=True)
        self.board = TensorBoardWriter(self.folder, self.study)
        self.gauges = Gauges(self.study, self.folder.path.name)
        self.monitor = start_monitor(self.folder.path.name, limits.timeout_s, limits.hung_after_s)
        self.files = FarFiles(self.folder.path.name)
        self.reporter = TrialReporter(
            self.study,
            self.folder,
            self.engine.rules,
            standing_of=self._standing_of,
            node_answers=node_answers,
            bring_files=self.files.bring,
            on_change=self._changed,
            code=(lambda: "") if self.cluster.joined else code_state,
        )
        self.show, self.refresh = Sparing(self._show), Sparing(self._refresh)
        self.keep_tables = Sparing(self._write_tables)
        self._asked: Any = None
        self.again = self._take_over() if self.resumed else []
        self.status = StudyStatus.begin(self.slots, self._elapsed_s)
        write_status(self.folder, self.status)
        self.folder.write_versions(versions(self.engine, self.cluster))
        if self.verifies is not None:
            note_claim(self.folder, self.verifies.claim, self.verifies.earlier)

    def _take_over(self) -> list[TrialRow]:
        """What the interrupted run has measured already is kept; returns the trials to run once more."""
        self.begun -= elapsed_before_s(self.folder)
        kept = kept_rows(self.folder, self.study)
        self.folder.write_study(self.study)
        again = self.reporter.restore(kept, self.engine.defaults())
        self._look_whether_enough()
        return again

    def search(self) -> None:
        """Run trials until the searcher has enough of them."""
        cut_half_line(self.folder.optuna_log)
        storage = JournalStorage(JournalFileBackend(str(self.folder.optuna_log)))
        drawn = sum(s.n_trials for s in optuna.get_all_study_summaries(storage))
        now = versions(self.engine, self.cluster)
        cache = read_cache(self.study, now, self.folder.parent, self.engine.defaults())
        sampler, reason = make_sampler(self.study, self.slots, drawn)
        self._tell_start([*self._notes(reason, cache)])
        if self.verifies is not None:
            self._take_from(self.verifies.claim)
        searcher = StudySearch(
            self.study,
            self.reporter,
            sampler=sampler,
            storage=storage,
            teller=Teller(self.study),
            defaults=self.engine.defaults(),
            slots=lambda: self.slots,
            placement=self._placement,
            may_start=self._may_start,
            may_verify=self._may_verify,
            refuse=self.engine.refuse,
            on_refused=self._on_refused,
            learned=self.learned,
            cache=cache,
        )
        if self.resumed:
            searcher.take_over(self.again)
        self._tuner(searcher).fit()

    def _notes(self, sampler: str, cache: Cache) -> Iterator[str]:
        """What is worth knowing before the first trial, a line each."""
        engine = ", ".join(f"{name} {number}" for name, number in self.engine.versions().items())
        yield from (f"engine: {engine}", f"cluster: {self.cluster.shape}", *claim_notes(self.folder))
        yield from [f"results are brought to {self.folder.store}"] if self.folder.store is not None else []
        yield from [f"metrics: {self.cluster.metrics_url}"] if self.cluster.metrics_url else []
        if self.verifies is None:
            yield f"sampler: {sampler}"
            yield from quality_notes(self.study)
            yield from (f"learned from {part}" for part in self.learned)
            yield from [f"cache: {cache}"] if self.study.search.cache else []
            yield from [_DUMMY] if self.study.engine.search_weights == "dummy" else []
        if self.resumed:
            kept = sum(row.state.teaches for row in self.reporter.rows)
            yield f"resumed: {kept} trials kept, {len(self.again)} interrupted ones run again"

    def _tell_start(self, notes: Sequence[str]) -> None:
        info = StudyInfo(
            self.study,
            self.folder.path,
            self.slots,
            self.cluster.dashboard_url,
            self.cluster.login_hint,
            tuple(notes),
            self.engine.defaults(),
            verifies=self.verifies is not None,
            elapsed_s=self._elapsed_s,
            store=self.folder.store,
        )
        self.watcher.started(info)
        for note in notes:
            self.log.write_study(note)

    def _take_from(self, claim: Claim) -> None:
        """The two settings that are measured again, where an interrupted run has not put them down already."""
        for name, params, source in ((BASELINE, {}, f"the baseline of {claim.run}"), ("", claim.params, claim.source)):
            if not any(row.state is State.EARLIER and row.name == name for row in self.reporter.rows):
                self.reporter.take(params, {**self.engine.defaults(), **params}, source, name)

    def interrupt(self) -> None:
        """End the running trials now, start no more, keep what was measured."""
        self.reporter.interrupted = True
        self.monitor.close.remote()

    def end_monitor(self) -> None:
        """The study's clock is needed no more."""
        with suppress(ray.exceptions.RayError):
            ray.get(self.monitor.finish.remote(), timeout=ANSWER_S)
            time.sleep(2 * TICK_S)

    def finish(self) -> int:
        """Write the verdict down and say it; returns the exit code."""
        self._show()
        rows = self.reporter.rows
        self.folder.write_rows(rows)
        answer = answer_of(self.folder, self.study, rows)
        self.folder.write_verdict(answer)
        lines = self._write_best(answer)
        self.board.verdict(answer)
        phase: Phase = "at fault" if self.reporter.at_fault else "finished"
        phase = "interrupted" if self.reporter.interrupted else phase
        self.log.write_study(f"{phase}: {answer.sentence}")
        if answer.warning:
            self.log.write_study(answer.warning)
        write_status(self.folder, replace(self.status, phase=phase, updated_at=time.time(), live=()))
        self.watcher.finished(Ending(answer, rows, lines, self.reporter.interrupted, self.reporter.ending))
        write_report(self.folder)
        if self.reporter.interrupted:
            return INTERRUPTED
        told = answer.holds if isinstance(answer, Recheck) else answer.winner
        return NO_RESULT if told is None else OK

    def _write_best(self, answer: Verdict) -> tuple[str, str] | None:
        """Keep the winner; returns how it is launched, None where there is no winner, or no node left to ask."""
        if answer.winner is None:
            for stale in (self.folder.best_file, self.folder.launch_file):  # of the run before it was resumed
                stale.unlink(missing_ok=True)
            return None
        try:
            lines, model = self.engine.launch_lines(answer.winner.params), self.engine.config_model()
        except AutotunerError as error:
            self.log.write_study(f"no launch line: {error}")
            return None
        write_best(self.folder, self.study, answer.winner, answer, model, lines[0])
        return lines

    def _tuner(self, searcher: StudySearch) -> Tuner:
        study = self.study
        name = study.study  # alone in what Ray Tune pickles into the results folder: a study holds secrets
        # Ray Tune hands the driver's AWS keys on to its actors, in a command line that everyone can read.
        class_cache.ENV_VARS_TO_PROPAGATE = {n for n in class_cache.ENV_VARS_TO_PROPAGATE if not is_secret(n)}
        job = Job(study, self.folder.path.name, self.folder.trials_dir, self.monitor)
        trainable = tune.with_parameters(self.trainable, job=job)
        trainable.__name__ = trainable.__qualname__ = self.trainable.__name__  # as the Ray dashboard shows it
        return Tuner(
            trainable,
            tune_config=TuneConfig(
                search_alg=searcher,
                scheduler=StopHopeless(study, self.reporter.row, lambda: self.reporter.best, self.reporter.stop),
                num_samples=-1,
                metric=SCORE,
                mode="max" if study.objective.direction == "maximize" else "min",
                trial_name_creator=lambda trial: f"{name}-{trial.config['number']}",
                trial_dirname_creator=lambda trial: f"{trial.config['number']}-{trial.trial_id}",
                reuse_actors=False,
            ),
            run_config=RunConfig(
                # The whole path as the name: Ray Tune's staging folders are per name and second, and shared by studies.
                name=str(self.folder.trials_dir.relative_to("/")),
                storage_path="/",
                callbacks=[StudyCallback(self.reporter, self._on_round, self._keep_up)],
                failure_config=FailureConfig(max_failures=0),
                checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )

    def _on_refused(self, params: Params, why: str) -> None:
        self.log.write_study(f"refused before any start {describe_params(params)}: {why}")

    def _may_start(self) -> bool:
        budget = self.study.search.time_budget
        if budget is not None and self._elapsed_s >= budget - self._verification_s(budget):
            self.reporter.end_search(f"the time budget of {budget:g} s is used up")
        return not self.reporter.complete

    def _look_whether_enough(self) -> None:
        if reason := enough(self.study, self.reporter.searched):
            self.reporter.end_search(reason)

    def _may_verify(self) -> bool:
        budget = self.study.search.time_budget
        in_time = budget is None or self._elapsed_s < budget
        return in_time and self.study.verify.top > 0 and not self.reporter.interrupted and not self.reporter.at_fault

    def _verification_s(self, budget: float) -> float:
        """Seconds to keep back for measuring the finalists again; at most half of the budget."""
        ended = [row.result.seconds["total"] for row in self.reporter.searched if row.state is State.MEASURED]
        if not ended:
            return 0.0
        return min(self.study.verify.starts / max(self.slots, 1) * sum(ended) / len(ended), budget / 2)

    @property
    def _elapsed_s(self) -> float:
        return time.time() - self.begun

    def _standing_of(self, trial_id: str) -> Standing:
        try:
            standing: Standing = ray.get(self.monitor.standing.remote(trial_id), timeout=ANSWER_S)
        except ray.exceptions.RayError:
            return self.standings.get(trial_id, Standing())
        # A monitor that was started again knows nothing of the trials from before.
        return standing if standing.started_at else self.standings.get(trial_id, standing)

    def _on_round(self, trial_id: str, result: dict[str, Any]) -> None:
        self.board.round(self.reporter.row(trial_id), int(result["training_iteration"]), round_metrics(result))

    def _keep_up(self) -> None:
        if self._asked is None and self.refresh.due:
            self._asked = self.monitor.standings.remote()
        # Not waited for: a monitor that is slow to start or to answer must not count as work of the driver's.
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            self.refresh()
        self.keep_tables()
        self.files.refresh(self._running())  # which spares itself: a node that is lost meanwhile takes the rest along

    def _placement(self, params: Params) -> dict[str, Any]:
        return self.cluster.trial_config(self.study, self.engine, params)

    def _look(self) -> None:
        """Follow the cluster: a node that joined is used at once, none is waited for that is gone."""
        self._looked_at = time.monotonic()
        now = self.cluster.now()
        if now.nodes == self.cluster.nodes:
            return
        self.cluster, self.slots = now, now.slots(self.study, self.engine)
        self.status = replace(self.status, concurrency=self.slots)
        self.log.write_study(f"cluster: {now.shape}; {self.slots} trials at once")

    def _refresh(self) -> None:
        """Bring table and status up to date with what the trials said last."""
        if time.monotonic() - self._looked_at >= LOOK_S:
            self._look()
        asked, self._asked = self._asked, None
        try:
            self.standings |= ray.get(asked, timeout=ANSWER_S)
        except ray.exceptions.RayError:
            return
        self._show()
        write_status(self.folder, self.status)

    def _running(self) -> dict[str, list[Path]]:
        """The folders of running trials, by the node on which they are written."""
        found: dict[str, list[Path]] = {}
        for row in self.reporter.live:
            for node_id in self.standings.get(row.trial_id, Standing()).node_ids:
                found.setdefault(node_id, []).append(self.folder.trial_dir(row.number, row.trial_id))
        return found

    def _write_tables(self) -> None:
        if self.stale:
            self.folder.write_tables(self.reporter.rows)
            self.stale = False

    def _live(self, row: TrialRow) -> LiveTrial:
        known = self.standings.get(row.trial_id, Standing())
        limit = self.study.trial.timeout_s
        return LiveTrial(row.number, known.stage, known.share, known.elapsed_s, limit, dict(known.metrics or {}))

    def warn(self, text: str) -> None:
        """Tell people now, and whoever reads the study's log; from any thread."""
        logger.warning("%s", text)
        self.log.write_study(text)

    def _changed(self, row: TrialRow) -> None:
        if row.state.finished:
            if row.taken_from is None:
                self.board.ended(row)
            self.stale = True
            self._look_whether_enough()
        if self.mirror is not None:
            trial_dir = self.folder.trial_dir(row.number, row.trial_id)
            self.mirror.due(trial_dir if row.state.finished else trial_dir / SUGGESTION)
        self.show()

    def _show(self) -> None:
        rows = self.reporter.rows
        live = {row.number: self._live(row) for row in self.reporter.live if row.state is State.RUNNING}
        self.watcher.update(rows, live)
        self.gauges.show(rows, time_left_s(self.study, rows, live, self.slots, self._elapsed_s))
        for event in self.events.since(rows, live):
            self.log.write(event.stage, event.text, event.trial)
        self.status = replace(self.status, updated_at=time.time(), live=tuple(live.values()))


def _error_of_a_file(error: BaseException) -> OSError | None:
    """What could not be written, behind an error of Ray Tune."""
    cause: BaseException | None = error
    while cause is not None and (not isinstance(cause, OSError) or isinstance(cause, ConnectionError)):
        cause = cause.__cause__ or cause.__context__
    return cause


def _cannot_write(folder: ResultsFolder, error: OSError) -> str:
    why = f"{folder.path} cannot be written to: {error.strerror or error}."
    return f"{why} So the study ends here; nothing that was measured is lost.\nMake room, and go on with --resume."


@contextmanager
def _stop_signals(interrupt: Callable[[], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the study cleanly, the second at once.

    A thread of its own hears them: the main one may be in Ray's C++ code, which looks for signals once a second and
    would take two for one.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)
    threading.Thread(target=_hear, args=(reader, interrupt), name="stop-signals", daemon=True).start()
    fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in _STOP}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd_before)
        os.close(writer)


def _hear(reader: int, interrupt: Callable[[], None]) -> None:
    heard = 0
    while number := os.read(reader, 1):
        heard += number[0] in _STOP
        if heard > 1:
            os._exit(INTERRUPTED)
        if heard:
            interrupt()
    os.close(reader)
