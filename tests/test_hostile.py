"""Study files by people who mean harm: each is refused with a clear message, or is harmless. More: `scripts/fuzz`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import HealthCheck, given, settings

from tests.hostile import STUDIES, examine


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(STUDIES)
def test_a_hostile_study_is_refused_or_harmless(study: tuple[bytes, Sequence[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        examine(*study, Path(folder))
