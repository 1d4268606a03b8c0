"""Which setting a study recommends, in which words: by restarts, and by single measurements."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_autotuner.report.finalists import contenders
from raytune_autotuner.report.verdict import Verdict, best_so_far, study_verdict, verdict
from raytune_autotuner.report.wording import contender_cells, percent
from raytune_autotuner.study.failure import Blame
from raytune_autotuner.study.space import changes
from raytune_autotuner.study.trial import BASELINE, State, TrialRow
from tests.report_samples import (
    BASE,
    METRIC,
    again,
    failed,
    make_study,
    measured,
    running,
    sample_rows,
    setting,
    verified,
    verified_rows,
)

GOOD = (140.0, 137.0, 144.0, 138.0, 141.0)
SAME = (101.0, 99.0, 102.0, 97.0, 102.0)
TWO = {"maximize": METRIC, "minimize": "ttft_ms_p90"}


def finalists() -> list[TrialRow]:
    """Baseline, trial 1 with one change and trial 2 with two."""
    return [measured(0, 100.0), measured(1, 120.0, {"a": 1}), measured(2, 121.0, {"a": 1, "b": 2})]


def judged(scores: dict[int, tuple[float, ...]], rows: list[TrialRow] | None = None) -> Verdict:
    return verdict(verified(rows or finalists(), scores), "maximize", METRIC)


def test_scores_of_different_hardware_are_not_compared_without_saying_so() -> None:
    rows = [replace(row, result=replace(row.result, hardware="H100")) for row in finalists()]
    assert study_verdict(make_study(), rows).warning is None
    rows[2] = replace(rows[2], result=replace(rows[2].result, hardware="A100"))
    assert "2 on H100; 1 on A100" in str(study_verdict(make_study(), rows).warning)


def test_a_scan_that_found_no_end_says_so() -> None:
    scan = make_study(
        workload={"concurrency": [4, 16]}, objective={"maximize": "max_load_under_slo", "slo": {"ttft_ms": {"mean": 9}}}
    )
    rows = [measured(number, load) for number, load in enumerate((4.0, 16.0, 16.0))]
    rows = [replace(row, result=replace(row.result, metrics={"max_load_under_slo": row.score or 0})) for row in rows]
    assert study_verdict(scan, rows[:1]).warning is None
    assert "level, 16, kept the SLOs in trial 1: add higher" in str(study_verdict(scan, rows[:2]).warning)
    assert "in 2 trials, which cannot be told apart" in str(study_verdict(scan, rows).warning)


# By restarts


def test_the_finalist_whose_interval_excludes_zero_wins_with_its_figures() -> None:
    answer = verdict(verified_rows(), "maximize", METRIC)
    assert answer.winner is not None
    assert (answer.winner.number, answer.verified, answer.keeps_defaults) == (2, True, False)
    assert answer.gain == pytest.approx(0.40, abs=0.005)
    assert answer.interval is not None
    assert answer.interval[0] < 0.4 < answer.interval[1]
    assert answer.noise == pytest.approx(0.0224, abs=0.0001)
    assert answer.sentence == (
        f"Run trial 2: {METRIC} 140 against 100 with the defaults, 40.0 % better (95 % interval +38.7 to +41.3 %), "
        "5 restarts each, noise 2.2 %."
    )
    assert answer.warning is None


def test_the_first_measurement_does_not_count_once_a_setting_was_measured_again() -> None:
    rows = [measured(0, 100.0), measured(1, 300.0, setting(4)), measured(2, 110.0, setting(8))]
    answer = judged({0: BASE, 1: SAME, 2: GOOD}, rows)
    assert answer.winner is not None
    assert answer.winner.number == 2


def test_where_no_interval_excludes_zero_the_defaults_are_kept_and_the_figures_are_said() -> None:
    answer = judged({0: BASE, 1: SAME, 2: BASE[::-1]})
    assert (answer.keeps_defaults, answer.gain) == (True, 0.0)
    assert answer.sentence.startswith("No significant gain: keep the defaults. Trial 1: +0.2 % (95 % interval ")
    assert "trial 2: +0.0 % (95 % interval " in answer.sentence
    assert answer.sentence.endswith("5 restarts each, noise 2.2 %.")


def test_a_dead_heat_goes_to_the_setting_with_fewer_changes() -> None:
    answer = judged({0: BASE, 1: GOOD, 2: tuple(1.004 * score for score in reversed(GOOD))})
    assert answer.winner is not None
    assert answer.winner.number == 1
    assert "Trial 2 cannot be told from it; it changes less." in answer.sentence


def test_a_dead_heat_is_one_with_the_best_mean_and_only_fewer_changes_are_called_so() -> None:
    rows = [measured(0, 100.0), *(measured(n, 150.0, dict.fromkeys("abc"[: 4 - n], n)) for n in (1, 2, 3))]
    scores: dict[int, tuple[float, ...]] = {
        0: (101.9, 97.2, 98.6, 100.7, 98.0),
        1: (149.8, 150.5, 147.5, 146.1, 150.6),
        2: (147.9, 143.1, 144.0, 149.8, 143.4),
        3: (138.6, 146.7, 135.7, 142.2, 134.4),  # cannot be told from trial 2, but from trial 1
    }
    assert judged(scores, rows).sentence.endswith("noise 2.0 %. Trial 1 cannot be told from it; it changes less.")
    level = [rows[0], rows[1], replace(rows[2], params=rows[1].params)]
    answer = judged({n: scores[n] for n in (0, 1, 2)}, level)
    assert answer.sentence.endswith("noise 2.0 %. Trial 2 cannot be told from it.")


def test_a_clear_lead_is_no_dead_heat() -> None:
    answer = judged({0: BASE, 1: GOOD, 2: tuple(1.2 * score for score in GOOD)})
    assert answer.winner is not None
    assert answer.winner.number == 2


def test_a_finalist_that_failed_once_is_out_and_that_is_said() -> None:
    rows = verified(finalists(), {0: BASE, 1: GOOD, 2: (150.0, 149.0)})
    answer = verdict([*rows, again(90, finalists()[2], 2)], "maximize", METRIC)
    assert answer.winner is not None
    assert answer.winner.number == 1
    assert answer.sentence.endswith("Trial 2 failed when started again (out-of-memory in trial 90).")


def test_a_restart_that_failed_by_the_studys_fault_is_held_against_nobody() -> None:
    rows = verified(finalists()[:2], {0: SAME, 1: GOOD})
    for setting_of in rows[:2]:
        lost = again(90 + setting_of.number, setting_of, 5)
        fault = replace(lost.result.failure, blame=Blame.STUDY)  # type: ignore[type-var]
        rows.append(replace(lost, result=replace(lost.result, failure=fault)))
    answer = verdict(rows, "maximize", METRIC)
    assert [one.failed for one in answer.contenders] == [None, None]
    assert answer.sentence == judged({0: SAME, 1: GOOD}, finalists()[:2]).sentence


def test_where_the_study_was_to_blame_for_every_restart_of_the_defaults_single_measurements_decide() -> None:
    rows = verified(finalists()[:2], {1: GOOD})
    lost = again(90, rows[0], 0)
    fault = replace(lost.result.failure, blame=Blame.STUDY)  # type: ignore[type-var]
    answer = verdict([*rows, replace(lost, result=replace(lost.result, failure=fault))], "maximize", METRIC)
    assert not answer.verified
    assert answer.sentence.endswith(" Measuring again was cut short.")


def test_a_finalist_that_misses_an_slo_in_most_restarts_is_out() -> None:
    rows = verified(finalists()[:2], {0: BASE})
    missing = [again(90 + i, rows[1], i, score, violation=(0.1, 0.2, -0.1)[i]) for i, score in enumerate(GOOD[:3])]
    answer = verdict([*rows, *missing], "maximize", METRIC)
    assert answer.keeps_defaults
    assert answer.sentence == (
        "Keep the defaults: none of the finalists held up. Trial 1 misses an SLO (median violation 0.1)."
    )


def test_one_missed_slo_of_three_restarts_does_not_decide() -> None:
    rows = verified(finalists()[:2], {0: BASE})
    mostly = [again(90 + i, rows[1], i, score, violation=(-0.1, 0.2, -0.1)[i]) for i, score in enumerate(GOOD[:3])]
    answer = verdict([*rows, *mostly], "maximize", METRIC)
    assert not answer.keeps_defaults
    assert answer.sentence.endswith(" Trial 1 missed an SLO in 1 of 3 restarts.")
    bad = verified(finalists()[:2], {0: BASE[:3]}, violation=0.4)
    answer = verdict([*bad, *mostly], "maximize", METRIC)
    assert "and every SLO met in 2 of 3 restarts, which differ by" in answer.sentence


def test_an_slo_that_is_missed_in_half_of_the_restarts_does_not_hold() -> None:
    rows = verified(finalists()[:2], {0: BASE[:4]})
    half = [again(90 + i, rows[1], i, score, violation=(0.1, -0.9)[i % 2]) for i, score in enumerate(GOOD[:4])]
    answer = verdict([*rows, *half], "maximize", METRIC)
    assert "none of the finalists held up. Trial 1 misses an SLO (median violation 0.1)." in answer.sentence


def test_a_lost_restart_that_was_run_again_counts_once() -> None:
    rows = verified(finalists(), {0: BASE, 1: GOOD})
    lost = replace(again(90, rows[1], 2), state=State.LOST)
    answer = verdict([*rows, lost], "maximize", METRIC)
    assert answer.chosen is not None
    assert len(answer.chosen.measured) == 5
    assert not answer.keeps_defaults


def test_a_restart_that_was_ended_early_is_no_measurement() -> None:
    rows = verified(finalists(), {0: BASE, 1: GOOD})
    stopped = replace(again(90, rows[1], 5, 999.0), state=State.STOPPED, score=None, bound=90.0)
    answer = verdict([*rows, stopped], "maximize", METRIC)
    assert answer.chosen is not None
    assert answer.chosen.mean() == 140.0


def test_when_minimising_the_lower_one_wins() -> None:
    rows = verified(finalists(), {0: BASE, 1: tuple(0.8 * score for score in BASE)})
    answer = verdict(rows, "minimize", "ttft_ms_p90")
    assert answer.gain == pytest.approx(0.2)
    assert "20.0 % better" in answer.sentence


def test_where_the_defaults_fail_when_started_again_the_finalist_wins_for_that_reason() -> None:
    rows = verified(finalists(), {0: BASE[:2], 1: GOOD})
    answer = verdict([*rows, again(90, rows[0], 2)], "maximize", METRIC)
    assert answer.winner is not None
    assert (answer.winner.number, answer.gain) == (1, None)
    assert answer.sentence == (
        f"Run trial 1: {METRIC} 140 and every SLO met over 5 restarts, which differ by 2.0 %; "
        "the defaults failed when started again (out-of-memory in trial 90)."
    )


def test_where_the_defaults_failed_in_the_search_already_the_finalist_wins() -> None:
    rows = verified([failed(0), *finalists()[1:]], {1: GOOD, 2: SAME})
    answer = verdict(rows, "maximize", METRIC)
    assert answer.winner is not None
    assert (answer.winner.number, answer.baseline) == (1, rows[0])
    assert answer.sentence.endswith("the defaults failed (out-of-memory).")


def test_defaults_that_were_lost_in_the_search_are_compared_once_they_were_measured_again() -> None:
    lost = replace(failed(0), state=State.LOST)
    answer = verdict(verified([lost, *finalists()[1:]], {0: BASE, 1: GOOD, 2: SAME}), "maximize", METRIC)
    assert answer.winner is not None
    assert answer.winner.number == 1
    assert answer.gain == pytest.approx(0.40, abs=0.01)
    answer = verdict(verified([lost, *finalists()[1:]], {1: GOOD, 2: SAME}), "maximize", METRIC)
    assert answer.sentence.endswith("the defaults could not be measured, by no fault of theirs (out-of-memory).")


def test_where_the_defaults_miss_an_slo_a_finalist_that_keeps_it_wins_though_it_is_slower() -> None:
    slower = [measured(0, 200.0, violation=0.3), measured(1, 120.0, {"a": 1})]
    rows = [*slower, *(again(10 + i, slower[0], i, 200.0 + i, violation=0.3) for i in range(3))]
    rows += [again(20 + i, slower[1], i, 120.0 + i) for i in range(3)]
    answer = verdict(rows, "maximize", METRIC)
    assert answer.winner is slower[1]
    assert "the defaults miss an SLO (median violation 0.3), at 201." in answer.sentence


def test_where_nothing_holds_up_the_closest_is_named() -> None:
    bad = [measured(0, 200.0, violation=0.3), measured(1, 120.0, {"a": 1}), measured(2, 130.0, {"a": 2})]
    rows = [*bad, *(again(10 + i, bad[0], i, 200.0 + i, violation=0.3) for i in range(3)), again(20, bad[1], 0)]
    rows += [again(30 + i, bad[2], i, 130.0 + i, violation=0.1) for i in range(3)]
    answer = verdict(rows, "maximize", METRIC)
    assert answer.winner is bad[2]
    assert answer.sentence.startswith("No setting held up when it was measured again.")
    assert "Trial 2 comes closest." in answer.sentence


def test_where_everything_fails_when_started_again_there_is_no_winner() -> None:
    rows = finalists()[:2]
    answer = verdict([*rows, again(10, rows[0], 0), again(11, rows[1], 0)], "maximize", METRIC)
    assert answer.winner is None


def test_too_much_noise_is_a_warning_that_names_the_restarts_needed() -> None:
    loud = (100.0, 80.0, 120.0, 90.0, 110.0)
    answer = judged({0: loud, 1: (104.0, 115.0, 95.0, 118.0, 90.0)})
    assert answer.keeps_defaults
    assert answer.warning is not None
    assert "a gain of 5.0 % could not be told from it by 5 restarts" in answer.warning
    assert "verify.restarts" in answer.warning


def test_scores_that_never_differ_are_not_called_noisy_but_stepped() -> None:
    answer = judged({0: (8.0,) * 3, 1: (16.0,) * 3}, finalists()[:2])
    assert answer.warning is not None
    assert answer.warning.startswith("The scores come in steps that are too wide to decide: a gain of 100.0 %")
    assert "Use about 4 restarts (verify.restarts), or a finer load" in answer.warning
    assert not judged({0: (8.0,) * 4, 1: (16.0,) * 4}, finalists()[:2]).keeps_defaults


def test_a_goodput_of_zero_with_the_defaults_is_beaten_without_a_share() -> None:
    answer = judged({0: (0.0, 0.0, 0.0), 1: (5.0, 5.1, 4.9)})
    assert answer.winner is not None
    assert (answer.winner.number, answer.gain) == (1, None)
    assert "5 against 0 with the defaults (95 % interval of the gain +" in answer.sentence


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_verification_that_was_cut_short_leaves_single_measurements_and_says_so(restarts: int) -> None:
    rows = verified(finalists(), {0: BASE[: restarts + 1], 1: GOOD[:restarts]})
    answer = verdict(rows, "maximize", METRIC)
    assert not answer.verified
    assert answer.sentence.startswith("Run trial 2")
    assert answer.sentence.endswith(
        "Each was measured once, so a small gain may be noise. Measuring again was cut short."
    )


def test_an_interrupted_verification_counts_what_there_is() -> None:
    answer = judged({0: BASE[:3], 1: GOOD[:3], 2: GOOD[:1]})
    assert answer.winner is not None
    assert answer.winner.number == 1
    assert "3 restarts each" in answer.sentence
    assert "Trial 2 was measured again too few times." in answer.sentence


@pytest.mark.parametrize("scores", [{0: (100, 101, 60), 1: (140, 141)}, {0: (100, 101), 1: (140, 141, 200)}])
def test_figures_are_of_the_restarts_that_both_settings_have(scores: dict[int, tuple[float, ...]]) -> None:
    answer = judged(scores)
    assert "140.5 against 100.5 with the defaults, 39.8 % better" in answer.sentence
    assert answer.sentence.endswith("2 restarts each, noise 0.7 %.")
    assert [line[2] for line in contender_cells(answer.contenders, answer.targets)] == ["mean", "100.5", "140.5"]


def test_a_setting_that_is_compared_in_fewer_restarts_than_another_says_so() -> None:
    answer = judged({0: BASE, 1: SAME, 2: BASE[:3]})
    assert "3 to 5 restarts each, noise 2.2 %." in answer.sentence
    names = [line[0] for line in contender_cells(answer.contenders, answer.targets)]
    assert names == ["setting", "defaults", "trial 1", "trial 2, 3 restarts"]


def test_restarts_are_no_part_of_the_search() -> None:
    rows = verified(finalists(), {0: BASE, 1: (500.0,)})
    best = best_so_far(rows, "maximize")
    assert best is not None
    assert best.number == 2


def test_a_baseline_that_was_lost_and_run_again_is_the_one_that_is_verified() -> None:
    lost = replace(failed(0), state=State.LOST, penalty=None)
    rows = verified([lost, replace(measured(1, 100.0), retry_of=0), measured(2, 140.0, {"a": 1})], {1: BASE, 2: GOOD})
    answer = verdict(rows, "maximize", METRIC)
    assert answer.baseline is rows[1]
    assert answer.gain == pytest.approx(0.4, abs=0.01)


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 4))
def test_any_rows_have_a_verdict_that_is_said_and_written(seed: int, restarts: int, top: int) -> None:
    source = random.Random(seed)
    rows = [measured(0, 100.0), *(measured(i, 100.0 + i, setting(i)) for i in range(1, top + 1))]
    for of in list(rows):
        for restart in range(source.randint(0, restarts)):
            scores = (source.choice([0.0, 50.0, 100.0, 101.0]),) if source.random() < 0.9 else ()
            rows.append(again(len(rows), of, restart, *scores, violation=source.choice([-0.5, 0.2])))
    answer = verdict(rows, source.choice(["maximize", "minimize"]), METRIC)
    assert answer.sentence
    assert json.loads(json.dumps(answer.to_dict(), allow_nan=False))["sentence"] == answer.sentence
    assert answer.winner is None or answer.winner in rows[: top + 1]


# Several objectives


def two(number: int, throughput: float, ttft: float, params: dict[str, object] | None = None) -> TrialRow:
    return replace(measured(number, throughput, params), scores=(throughput, ttft))


def test_with_several_objectives_the_knee_of_the_front_is_recommended_and_the_front_is_told() -> None:
    rows = [two(0, 100, 50), two(1, 150, 90, {"a": 1}), two(2, 140, 55, {"a": 2}), two(3, 90, 60, {"a": 3})]
    answer = study_verdict(make_study(objective=TWO), rows)
    assert answer.winner is rows[2]
    assert answer.front == (0, 1, 2)
    assert answer.sentence == (
        f"Run trial 2: {METRIC} 140 (100 with the defaults), ttft_ms_p90 55 (50 with the defaults); the knee of a "
        "Pareto front with trials 0, 1. Each was measured once, so small gains may be noise."
    )


def again_two(rows: list[TrialRow], means: dict[int, tuple[float, float]]) -> list[TrialRow]:
    made = list(rows)
    for restart, share in enumerate((1.0, 0.99, 1.01)):
        for number, (first, second) in means.items():
            wiggle = 1.0 + 0.002 * ((number + restart) % 3)
            made.append(again(len(made), rows[number], restart, first * share * wiggle, second * share / wiggle))
    return made


def test_each_objective_has_its_own_interval() -> None:
    rows = [two(0, 100, 50), two(1, 140, 60, {"a": 1})]
    answer = study_verdict(make_study(objective=TWO), again_two(rows, {0: (100, 50), 1: (140, 60)}))
    assert answer.winner is rows[1]
    assert "40.0 % better (95 % interval " in answer.sentence
    assert "ttft_ms_p90 59.88 against 49.9 with the defaults, 20.0 % worse (95 % interval -" in answer.sentence
    assert [c.choices for c in answer.contenders[1].comparisons] == [2, 2]


def test_what_cannot_be_told_apart_does_not_count_against_a_gain_in_the_other_objective() -> None:
    rows = [two(0, 100, 50), two(1, 99.9, 25, {"a": 1})]
    answer = study_verdict(make_study(objective=TWO), again_two(rows, {0: (100, 50), 1: (99.9, 25)}))
    assert answer.winner is rows[1]
    assert "not told apart" in answer.sentence


def test_a_compromise_that_is_worse_than_the_defaults_keeps_them() -> None:
    rows = [two(0, 100, 50), two(1, 90, 25, {"a": 1})]
    answer = study_verdict(make_study(objective=TWO), again_two(rows, {0: (100, 50), 1: (90, 25)}))
    assert answer.keeps_defaults
    assert "Keep the defaults: they are the better compromise" in answer.sentence


# Figures for people and programs


def test_the_table_has_a_line_a_setting_and_objective() -> None:
    rows = [two(0, 100, 50), two(1, 140, 60, {"a": 1})]
    answer = study_verdict(make_study(objective=TWO), again_two(rows, {0: (100, 50), 1: (140, 60)}))
    head, *lines = contender_cells(answer.contenders, answer.targets)
    assert head == ["setting", "metric", "mean", "spread", "gain", "95 % interval"]
    assert [line[:2] for line in lines] == [
        ["defaults", METRIC],
        ["", "ttft_ms_p90"],
        ["trial 1", METRIC],
        ["", "ttft_ms_p90"],
    ]
    assert lines[2][4] == "+40.0 %"


def test_the_verdict_for_programs_has_every_figure() -> None:
    told = json.loads(json.dumps(verdict(verified_rows(), "maximize", METRIC).to_dict()))
    assert (told["winner"], told["verified"], told["keep_defaults"], told["confidence"]) == (2, True, False, 0.95)
    assert told["params"] == setting(16)
    best = told["measured_again"][1]
    assert (best["trial"], best["scores"][METRIC], best["mean"][METRIC]) == (2, list(GOOD), 140.0)
    assert best["gains"][METRIC]["pairs"] == 5
    assert best["gains"][METRIC]["low"] == told["interval"][0]
    assert told["noise"] == told["measured_again"][0]["spread"][METRIC]


def test_the_defaults_come_first_and_carry_no_comparison() -> None:
    found = contenders(verified_rows(), [(METRIC, "maximize")])
    assert [one.name for one in found] == ["defaults", "trial 2", "trial 3"]
    assert [len(one.comparisons) for one in found] == [0, 1, 1]


@pytest.mark.parametrize(("share", "text"), [(0.02934, "2.9 %"), (-0.5, "-50.0 %"), (12.0, "1,200 %")])
def test_shares_are_told_to_a_tenth_of_a_percent(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.slow
def test_the_benchmark_of_error_rates_judges_whole_studies(root: Path, tmp_path: Path) -> None:
    table = tmp_path / "lines.json"
    command = [sys.executable, str(root / "scripts" / "bench" / "verdict"), "--studies", "2", "--json", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| A/A, simulated engine, TPE | " in done.stdout
    assert {line["studies"] for line in json.loads(table.read_text())} == {2, 20}


# By single measurements


def test_the_best_feasible_trial_wins() -> None:
    answer = verdict(sample_rows(), "maximize", METRIC)
    assert answer.winner is not None
    assert answer.winner.number == 2
    assert answer.gain == pytest.approx(0.43)
    assert "143 against 100 with the defaults, 43 % better (x1.43)" in answer.sentence
    assert "Each was measured once" in answer.sentence


def test_when_minimising_less_is_better_and_a_gain_is_still_positive() -> None:
    answer = verdict([measured(0, 100.0), measured(1, 80.0, setting(4)), measured(2, 120.0, setting(8))], "minimize")
    assert answer.winner is not None
    assert answer.winner.number == 1
    assert answer.gain == pytest.approx(0.2)
    assert "20 % better (x0.80)" in answer.sentence


def test_where_nothing_beats_the_baseline_the_defaults_are_kept() -> None:
    answer = verdict([measured(0, 100.0), measured(1, 100.0, setting(4)), failed(2, setting(8))], "maximize")
    assert answer.keeps_defaults
    assert answer.sentence.startswith("Keep the defaults")


def test_of_equal_scores_the_one_with_fewer_changes_wins() -> None:
    rows = [measured(1, 5.0, {"a": 1, "b": 2}), measured(2, 5.0, {"a": 0, "b": 2})]
    answer = verdict(rows, "maximize", fixed={"a": 0})
    assert answer.winner is rows[1]
    assert changes(rows[1].params, {"a": 0}) == {"b": 2}


def test_where_every_slo_is_missed_the_closest_is_named_and_it_is_said() -> None:
    rows = [measured(0, 100.0, violation=0.5), measured(1, 50.0, setting(4), violation=0.1)]
    answer = verdict(rows, "maximize")
    assert answer.winner is rows[1]
    assert not answer.winner.feasible
    assert "All 2 settings measured miss an SLO; trial 1 comes closest" in answer.sentence


def test_a_failed_baseline_gives_a_winner_without_a_gain() -> None:
    answer = verdict([failed(0), measured(1, 50.0, setting(4))], "maximize")
    assert answer.winner is not None
    assert answer.gain is None
    assert "the defaults have no score" in answer.sentence


@pytest.mark.parametrize("rows", [[], [running(0)], [failed(0), failed(1, setting(4))]])
def test_where_nothing_was_measured_there_is_no_winner_but_advice(rows: list[TrialRow]) -> None:
    answer = verdict(rows, "maximize")
    assert answer.winner is None
    assert answer.sentence.startswith("Nothing was measured")


def test_a_baseline_score_of_zero_gives_no_gain() -> None:
    answer = verdict([measured(0, 0.0), measured(1, 5.0, setting(4))], "maximize")
    assert answer.gain is None
    assert answer.winner is not None
    assert answer.winner.name != BASELINE
