"""All trials of a study by Ray's trial id, with what is asked of them at every step kept at hand.

Rows go in as they change; what comes out costs the same however many trials there are, but for `rows` and `searched`.
Knows neither Ray nor Optuna, and decides nothing: the reporter makes the rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from raytune_autotuner.report.verdict import best_with
from raytune_autotuner.study.study import Direction
from raytune_autotuner.study.trial import State, TrialRow


class Book:
    """The trials of one study; `direction` is that of its first objective."""

    def __init__(self, direction: Direction) -> None:
        self._direction = direction
        self._rows: dict[str, TrialRow] = {}
        self._live: dict[str, TrialRow] = {}
        self._keys: dict[str, str] = {}
        self._of_setting: dict[str, list[str]] = defaultdict(list)
        self._lost: dict[str, list[TrialRow]] = defaultdict(list)
        self.counted = 0
        """Trials of the search that use up the budget: measured or graded, not answered by an earlier run."""
        self.baseline: TrialRow | None = None
        """The measured baseline, once there is one; of a run that verifies an earlier one, its first restart."""
        self.reference: TrialRow | None = None
        """The baseline that others' answers are held against: the first that gave some, also if it failed later."""
        self.verifies_only = False
        """Whether nothing is searched: an earlier run's settings are measured again."""
        self._defaults: int | None = None
        """Number of the baseline that was taken from an earlier run."""
        self.best: TrialRow | None = None
        """The feasible trial of the search with the best score, of the first objective."""
        self.at_fault = False
        """Whether a trial failed in a way that no setting can mend."""

    @property
    def rows(self) -> list[TrialRow]:
        """All trials by number."""
        return list(self._rows.values())  # they are numbered in the order in which they are put in

    @property
    def searched(self) -> list[TrialRow]:
        """The trials of the search: all but those that measure a setting again for the verdict."""
        return [row for row in self._rows.values() if row.verifies is None]

    @property
    def live(self) -> Mapping[str, TrialRow]:
        """The trials that have not ended."""
        return self._live

    @property
    def next_number(self) -> int:
        """One more than the last trial's: what a broken folder has lost leaves a gap."""
        return next((row.number + 1 for row in reversed(self._rows.values())), 0)

    def __getitem__(self, trial_id: str) -> TrialRow:
        return self._rows[trial_id]

    def add(self, row: TrialRow, key: str) -> None:
        """A new trial of the setting `key`."""
        self._keys[row.trial_id] = key
        self._of_setting[key].append(row.trial_id)
        self.put(row)

    def put(self, row: TrialRow) -> None:
        """The trial as it stands now; one that has ended does not change any more."""
        self._rows[row.trial_id] = row
        if not row.state.finished:
            self._live[row.trial_id] = row
            return
        self._live.pop(row.trial_id, None)
        lost = self._lost[self._keys[row.trial_id]]
        if row.state is State.LOST:
            lost.append(row)
        elif row.state is State.MEASURED:
            lost[:] = [one for one in lost if one.verifies is not None]
        self.at_fault = self.at_fault or row.at_fault
        if row.verifies is None:
            self._settle(row)
        elif row.verifies == self._defaults:
            self._note_baseline(row)

    def known(self, key: str) -> TrialRow | None:
        """The trial of the search that measures, has measured or graded the setting `key`."""
        rows = [self._rows[trial_id] for trial_id in self._of_setting.get(key, ())]
        searched = (row for row in rows if row.verifies is None)
        return next((row for row in searched if row.state.teaches or not row.state.finished), None)

    def lost(self, trial_id: str) -> Sequence[TrialRow]:
        """The trials whose start this one repeats, or is: of its setting, lost by the environment's fault.

        Each restart for the verdict is a start of its own, and the search's was well once the setting was measured.
        """
        row = self._rows[trial_id]
        lost = self._lost[self._keys[trial_id]]
        return [one for one in lost if (one.verifies, one.restart) == (row.verifies, row.restart)]

    def _settle(self, row: TrialRow) -> None:
        """A trial of the search has ended."""
        self.counted += row.counts
        if row.name:
            self._note_baseline(row)
        if row.state is State.EARLIER:
            self.verifies_only = True
            self._defaults = row.number if row.name else self._defaults
        self.best = best_with(self.best, row, self._direction)

    def _note_baseline(self, row: TrialRow) -> None:
        if self.reference is None and row.result.answers:
            self.reference = row
        if self.baseline is None and row.state is State.MEASURED:
            self.baseline = row
