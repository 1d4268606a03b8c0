"""Nothing outlives its trial, through Ray: one process tree of the worst manners, ended in every way that there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from kill_study import CASES, Outcome, run_case

AT_ONCE = 3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ray_address: str
) -> Iterator[Mapping[str, Future[Outcome]]]:
    """Every case that is asked for, some at a time: most of their time is waiting."""
    asked = {
        item.callspec.params["name"]
        for item in request.session.items
        if hasattr(item, "callspec") and "name" in item.callspec.params
    }
    folder = tmp_path_factory.mktemp("kill")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            name: pool.submit(run_case, case, folder / name.replace(" ", "-"), ray_address)
            for name, case in CASES.items()
            if name in asked
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
    assert outcome.states == outcome.case.states, outcome.said
