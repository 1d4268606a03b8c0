"""What a failed trial says of settings that were not tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_autotuner.engine.reading import diagnose
from raytune_autotuner.study.failure import Failure
from raytune_autotuner.study.space import Params, parse_space
from raytune_autotuner.study.trial import State, TrialResult, TrialRow
from raytune_autotuner.tune.lessons import Lessons

LOGS = Path(__file__).parent / "engine_logs"
SPACE = {
    "block-size": {"choice": [7, 16, 32]},
    "max-num-seqs": {"int": [1, 64]},
    "attention-backend": {"choice": ["A", "B"]},
}
DEFAULTS = {"block-size": 128, "attention-backend": "A", "max-num-seqs": 16}


def read(log: str) -> Failure:
    """The failure of a real engine's log."""
    with (LOGS / log).open(encoding="utf-8") as lines:
        failure = diagnose(lines, exit_code=1).failure
    assert failure is not None
    return Failure.from_dict(failure.to_dict())  # as a results folder gives it back


def after(failure: Failure, params: Params, space: Params = SPACE, state: State = State.FAILED) -> Lessons:
    lessons = Lessons(parse_space(space), DEFAULTS)
    lessons.note(TrialRow(3, "t", "", params, state, TrialResult({}, failure, {})))
    return lessons


@pytest.mark.parametrize(
    ("setting", "repeats"),
    [
        ({"block-size": 7, "max-num-seqs": 64}, True),
        ({"block-size": 7, "max-num-seqs": 2, "attention-backend": "A"}, True),  # A is the default: the same setting
        ({"block-size": 7, "attention-backend": "B"}, False),  # other kernels, other block sizes
        ({"block-size": 16, "max-num-seqs": 64}, False),
        ({}, False),
    ],
)
def test_a_block_size_without_a_kernel_is_not_started_twice(setting: Params, repeats: bool) -> None:
    found = after(read("block7.log"), {"block-size": 7, "max-num-seqs": 8}).repeated(setting)
    assert (found is not None) == repeats
    if found is not None:
        assert found.evidence.startswith("as trial 3: ValueError: No common block size for 7")


def test_a_failure_that_may_rest_on_anything_says_nothing_of_other_settings() -> None:
    failure = read("kvhuge.log")
    assert failure.depends == ()
    assert after(failure, {"block-size": 32, "max-num-seqs": 8}).repeated({"block-size": 32}) is None


def test_where_none_of_its_parameters_is_searched_nothing_is_refused() -> None:
    space = {"max-num-seqs": {"int": [1, 64]}}
    assert after(read("block7.log"), {"max-num-seqs": 8}, space).repeated({"max-num-seqs": 9}) is None


def test_a_lost_trial_teaches_nothing() -> None:
    lessons = after(read("block7.log"), {"block-size": 7}, state=State.LOST)
    assert lessons.repeated({"block-size": 7}) is None
