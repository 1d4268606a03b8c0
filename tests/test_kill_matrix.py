"""Nothing outlives its trial, through Ray: one process tree of the worst manners, ended in every way that there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.kill_study import CASES, Outcome, run_case

AT_ONCE = 3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ray_address: str
) -> Iterator[Mapping[str, Future[Outcome]]]:
    """Every case that is asked for, some at a time: most of their time is waiting."""
    asked = {name for name in CASES if any(f"[{name}]" in item.name for item in request.session.items)}
    folder = tmp_path_factory.mktemp("kill")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            name: pool.submit(run_case, CASES[name], folder / name.replace(" ", "-"), ray_address)
            for name in sorted(asked, key=lambda name: not CASES[name].own_ray)  # the longest first
        }


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_a_trial_is_left_after(name: str, outcomes: Mapping[str, Future[Outcome]]) -> None:
    outcome = outcomes[name].result()
    assert outcome.survivors == [], outcome.said
    assert outcome.marked == {}
    assert outcome.rays_left == []


@pytest.mark.parametrize("name", CASES)
def test_the_study_goes_on_or_ends_as_it_should_after(name: str, outcomes: Mapping[str, Future[Outcome]]) -> None:
    outcome = outcomes[name].result()
    assert outcome.exit_code == outcome.case.exit_code, outcome.said
    assert outcome.case.states in (None, outcome.states), outcome.said


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exit_code == 0])
def test_what_was_verified_stands_in_the_trials_log_after(name: str, outcomes: Mapping[str, Future[Outcome]]) -> None:
    folder = outcomes[name].result().folder
    assert folder is not None
    for row in folder.read_rows():
        log = (folder.trial_dir(row.number, row.trial_id) / "trial.log").read_text()
        (line,) = [line for line in log.splitlines() if "engine ended" in line]
        assert "no process left" in line
        assert line.endswith("free")
