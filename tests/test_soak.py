"""A short form of scripts/bench/soak: a study in which something goes wrong at random balances its books."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak_study import accounts, left_over, run_soak

TRIALS, SEED = 8, 3


@pytest.mark.slow
def test_every_trial_is_accounted_for_once_and_nothing_is_left(tmp_path: Path, ray_address: str) -> None:
    soak = run_soak(tmp_path, TRIALS, slots=4, seed=SEED, address=ray_address)
    assert soak.exit_code == 0, soak.said
    assert list(accounts(soak, TRIALS, SEED)) == []
    assert list(left_over(soak)) == []
