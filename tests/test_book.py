"""What is asked of a study's trials at every step, without looking through all of them."""

from __future__ import annotations

from dataclasses import replace

from raytune_autotuner.study.failure import Blame
from raytune_autotuner.study.trial import State, TrialRow
from raytune_autotuner.tune.book import Book
from tests.report_samples import NO_MEMORY, failed, measured, running, setting


def book(*rows: TrialRow, key: str = "one setting") -> Book:
    made = Book("maximize")
    for row in rows:
        made.add(row, key)
    return made


def test_a_trial_counts_once_it_has_ended_by_its_own_doing() -> None:
    trials = book(measured(0, 100.0), failed(1, setting(4)), running(2, setting(8)))
    assert (trials.counted, [row.number for row in trials.live.values()]) == (2, [2])
    trials.put(measured(2, 90.0, setting(8)))
    trials.add(replace(failed(3, setting(4)), state=State.LOST), "another")
    trials.add(replace(measured(4, 90.0, setting(4)), verifies=0, restart=0), "one setting")
    assert (trials.counted, trials.next_number, len(trials.live)) == (3, 5, 0)
    assert [row.number for row in trials.searched] == [0, 1, 2, 3]


def test_a_trial_that_a_broken_folder_has_lost_leaves_a_gap_in_the_numbers() -> None:
    assert book().next_number == 0
    assert book(measured(0, 100.0), measured(2, 90.0, setting(8))).next_number == 3


def test_a_setting_is_known_while_it_runs_and_once_it_taught_something() -> None:
    trials = book(running(0, setting(4)))
    assert trials.known("one setting") is not None
    assert trials.known("another") is None
    trials.put(replace(running(0, setting(4)), state=State.LOST))
    assert trials.known("one setting") is None
    trials.add(replace(running(1, setting(4)), verifies=7), "one setting")
    assert trials.known("one setting") is None
    trials.add(measured(2, 90.0, setting(4)), "one setting")
    known = trials.known("one setting")
    assert known is not None
    assert known.number == 2


def test_losses_are_counted_by_setting() -> None:
    lost = [replace(running(number, setting(4)), state=State.LOST) for number in range(3)]
    trials = book(*lost[:2])
    trials.add(lost[2], "another")
    assert [len(trials.lost(row.trial_id)) for row in lost] == [2, 2, 1]


def test_a_loss_counts_against_its_own_restart_and_in_the_search_until_the_setting_is_measured() -> None:
    lost = [replace(running(number, setting(4)), state=State.LOST) for number in range(4)]
    restarts = [replace(row, verifies=0, restart=row.number // 2) for row in lost[1:]]
    trials = book(lost[0], *restarts)
    assert [len(trials.lost(row.trial_id)) for row in lost] == [1, 1, 2, 2]
    trials.add(measured(4, 90.0, setting(4)), "one setting")
    assert [len(trials.lost(row.trial_id)) for row in lost] == [0, 1, 2, 2]


def test_the_best_is_a_feasible_trial_of_the_search() -> None:
    trials = book(measured(0, 100.0), measured(1, 300.0, setting(4), 0.5), measured(2, 200.0, setting(8)))
    trials.add(replace(measured(3, 400.0, setting(8)), verifies=2, restart=0), "one setting")
    assert trials.best is not None
    assert trials.baseline is not None
    assert (trials.best.number, trials.baseline.number) == (2, 0)


def test_a_fault_of_the_study_is_remembered() -> None:
    assert not book(failed(0, setting(4))).at_fault
    assert book(failed(0, setting(4), replace(NO_MEMORY, blame=Blame.STUDY)), measured(1, 100.0, setting(8))).at_fault
