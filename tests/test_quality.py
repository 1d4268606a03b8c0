"""The quality guard: what is asked of an engine, and how far a setting may be from the baseline."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.search import Searcher

from raytune_autotuner.engine.simulated import fidelity
from raytune_autotuner.engine.simulated.setting import Setting
from raytune_autotuner.load.quality import (
    ANSWER_TOKENS,
    QualityUnknown,
    answer_text,
    ask,
    log_probabilities,
    texts,
)
from raytune_autotuner.report.results import QUALITY, write_result
from raytune_autotuner.score.quality import Quality, QualityLoss, answer_change, judge, loss, perplexity
from raytune_autotuner.study.failure import Blame, Kind, Stage
from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.study import QualitySpec
from raytune_autotuner.study.trial import TrialResult
from raytune_autotuner.tune.standing import Standing
from tests.report_samples import NO_MEMORY
from tests.searches import Search
from tests.simulated_server import Server, free_port
from tests.studies import BASE, merged

LIMITS = QualitySpec()


def measure(server: Server, within_s: float = 30.0, check: Callable[[], None] | None = None) -> Quality:
    return ask(server.base_url, "m", deadline=time.monotonic() + within_s, check=check)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts fast servers that are closed at the test's end."""
    started: list[Server] = []

    def start_one(*flags: str) -> Server:
        started.append(Server(tmp_path, "--speed", "20", *flags))
        return started[-1].wait_ready()

    yield start_one
    for one in started:
        one.close()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Quality:
    """Of the baseline."""
    server = Server(tmp_path_factory.mktemp("baseline"), "--speed", "20")
    try:
        return measure(server.wait_ready())
    finally:
        server.close()


# --- asked of a server ---


def test_an_engine_is_the_same_after_a_restart(start: Callable[..., Server], reference: Quality) -> None:
    first, second = reference, measure(start())
    assert first == second
    assert len(first.answers) == len(texts().prompts)
    assert {len(answer.split()) for answer in first.answers} == {ANSWER_TOKENS}
    assert loss(second, first) == QualityLoss(0.0, 0.0)


@pytest.mark.parametrize(
    ("flags", "damaged"),
    [
        (("--dtype", "float16"), False),
        (("--kv-cache-dtype", "fp8"), False),
        (("--quantization", "fp8"), False),
        (("--kv-cache-dtype", "fp8_e5m2"), True),
    ],
)
def test_a_coarse_format_is_found_and_a_finer_one_is_let_pass(
    start: Callable[..., Server], reference: Quality, flags: tuple[str, ...], damaged: bool
) -> None:
    found = loss(measure(start(*flags)), reference)
    assert (judge(found, LIMITS) is not None) == damaged
    assert found.answer_change > 0


def test_a_deadline_ends_the_asking(start: Callable[..., Server]) -> None:
    with pytest.raises(TimeoutError):
        measure(start("--speed", "0.1"), within_s=0.2)


def test_what_the_check_raises_is_raised(start: Callable[..., Server]) -> None:
    def check() -> None:
        raise KeyError("the engine is dead")

    with pytest.raises(KeyError):
        measure(start("--fault", "hang@load:mode=engine"), check=check)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--fault", "error500@load"), "asked for prompt log-probabilities, the engine gave none: HTTP 500"),
        (("--fault", "error500@load:after=14"), "asked for a greedy answer, the engine gave none: HTTP 500"),
        (("--fault", "garbage@load:mode=json"), "no completion"),
        (("--fault", "garbage@load:mode=html"), "gave none: JSONDecodeError"),
        (("--max-model-len", "64"), "maximum context length is 64 tokens"),
        (("--fault", "crash@load:after=3"), "gave none: Connection"),
    ],
)
def test_an_engine_that_cannot_be_asked_is_an_error_that_says_why(
    start: Callable[..., Server], flags: tuple[str, ...], words: str
) -> None:
    with pytest.raises(QualityUnknown, match=words):
        measure(start(*flags))


def test_nobody_at_the_address_is_an_error_too() -> None:
    with pytest.raises(QualityUnknown, match="ConnectionRefusedError"):
        ask(f"http://127.0.0.1:{free_port()}", "m", deadline=time.monotonic() + 5)


# --- the answers of an engine, read ---


def completion(*entries: Any) -> dict[str, Any]:
    return {"choices": [{"text": "", "prompt_logprobs": [None, *entries]}]}


def entry(value: float) -> dict[str, Any]:
    return {"17": {"logprob": value, "rank": 4, "decoded_token": "x"}, "3": {"logprob": -0.1, "rank": 1}}


def test_a_tokens_log_probability_is_its_own_and_not_the_likeliest() -> None:
    assert log_probabilities(completion(entry(-2.5), entry(-1))) == [-2.5, -1.0]


@pytest.mark.parametrize("value", [math.nan, -math.inf, -9999.0])
def test_a_number_that_is_not_finite_is_an_error_and_never_a_perplexity(value: float) -> None:
    with pytest.raises(QualityUnknown, match=f"token 2 of a fixed text a log-probability of {value}"):
        log_probabilities(completion(entry(-1), entry(value)))


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"choices": []},
        {"choices": [{"text": "x"}]},
        {"choices": [{"prompt_logprobs": None}]},
        completion(),
        completion(None),
        completion({}),
        completion({"17": {"logprob": None}}),
        completion({"17": {"rank": 1}}),
    ],
)
def test_log_probabilities_that_are_missing_are_an_error(body: Any) -> None:
    with pytest.raises(QualityUnknown):
        log_probabilities(body)


@pytest.mark.parametrize("body", [{}, {"choices": [{"text": None}]}])
def test_an_answer_without_text_is_an_error(body: Any) -> None:
    with pytest.raises(QualityUnknown):
        answer_text(body)


def test_the_fixed_text_is_long_varied_and_in_short_passages() -> None:
    passages, prompts = texts()
    assert 9_000 < sum(map(len, passages)) < 14_000
    assert max(map(len, passages)) < 1_000
    assert len(set(prompts)) == len(prompts) >= 16
    assert all(prompt.strip() for prompt in prompts)


# --- compared ---


def test_equal_probabilities_for_n_words_are_a_perplexity_of_n() -> None:
    assert perplexity([math.log(1 / 50)] * 7) == pytest.approx(50)
    with pytest.raises(ValueError, match="at least one token"):
        perplexity([])


@pytest.mark.parametrize(
    ("answer", "other", "change"),
    [
        ("a b c", "a b c", 0),
        ("", "", 0),
        ("a b c d", "a b x y", 1 / 3),
        ("x", "a b c d", 1),
        ("", "a b c d", 1),
        ("a b", "a b c d", 1 / 3),
        ("a b c d", "a b", 1 / 3),
    ],
)
def test_only_the_word_at_which_an_answer_parts_is_counted(answer: str, other: str, change: float) -> None:
    assert answer_change([answer], [other]) == pytest.approx(change)


def test_long_agreement_elsewhere_outweighs_one_coin_that_falls_the_other_way() -> None:
    same = " ".join(["word"] * 30)
    assert answer_change([same, same, "other"], [same, same, "words"]) == pytest.approx(1 / 63)


@given(st.lists(st.tuples(st.text("ab ", max_size=12), st.text("ab ", max_size=12)), min_size=1))
def test_the_change_is_a_share_and_zero_only_for_equal_words(pairs: list[tuple[str, str]]) -> None:
    ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    change = answer_change(ours, theirs)
    assert 0 <= change <= 1
    assert change == answer_change(theirs, ours)
    assert (change == 0) == all(our.split() == their.split() for our, their in pairs)


@pytest.mark.parametrize("answers", [(), ("a",), ("a", "b", "c")])
def test_answers_to_other_prompts_are_not_compared(answers: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="As many answers"):
        loss(Quality(10.0, answers), Quality(10.0, ("a", "b")))


def test_a_loss_is_relative_to_the_baseline() -> None:
    found = loss(Quality(10.3, ("a b",)), Quality(10.0, ("a b",)))
    assert found.perplexity_rise == pytest.approx(0.03)
    assert found.answer_change == 0


def test_a_setting_at_its_limits_passes_and_one_beyond_says_which() -> None:
    spec = QualitySpec(max_perplexity_rise=0.02, max_answer_change=0.1)
    assert judge(QualityLoss(0.02, 0.1), spec) is None
    assert judge(QualityLoss(-0.5, 0.0), spec) is None
    told = judge(QualityLoss(0.0312, 0.0), spec)
    assert (
        told
        == "the perplexity of a fixed text is 3.12% above the baseline's, with quality.max_perplexity_rise at 2.00%"
    )
    assert "20.0% of the words" in (judge(QualityLoss(0.0, 0.2), spec) or "")


def test_what_is_not_a_number_never_passes() -> None:
    assert judge(QualityLoss(math.nan, 0.0), LIMITS) is not None
    assert judge(QualityLoss(0.0, math.nan), LIMITS) is not None


# --- the simulated engine's own ---

COARSER = [
    Setting(dtype="float32"),
    Setting(dtype="float16"),
    Setting(),
    Setting(kv_cache_dtype="fp8"),
    Setting(kv_cache_dtype="fp8", quantization="fp8"),
    Setting(kv_cache_dtype="fp8_e5m2", quantization="fp8"),
]


def test_a_coarser_format_is_never_better() -> None:
    for finer, coarser in pairwise(COARSER):
        assert fidelity.perplexity_rise(finer) < fidelity.perplexity_rise(coarser)
        assert fidelity.parting_chance(finer) < fidelity.parting_chance(coarser) < 1


@given(st.text(min_size=1), st.integers(1, 60))
def test_where_a_finer_answer_parts_from_the_exact_one_a_coarser_has_parted(prompt: str, tokens: int) -> None:
    exact, *others = (fidelity.answer(prompt, tokens, fidelity.parting_chance(setting)) for setting in COARSER)
    kept = [sum(a == b for a, b in zip(exact, other, strict=True)) for other in others]
    assert kept == sorted(kept, reverse=True)


@given(st.text(min_size=5), st.floats(0, 0.5))
def test_a_rise_multiplies_the_perplexity(prompt: str, rise: float) -> None:
    tokens = fidelity.prompt_tokens(prompt)
    exact, raised = (perplexity(fidelity.log_probabilities(tokens, r)) for r in (0.0, rise))
    assert raised / exact == pytest.approx(math.exp(rise))


# In a search

POINTS = [{"max-num-seqs": 2, "block-size": 16}, {"max-num-seqs": 8, "block-size": 16}]
BUSY = replace(NO_MEMORY, kind=Kind.DEVICE_BUSY, blame=Blame.ENVIRONMENT)


@pytest.fixture
def guarded(tmp_path: Path) -> Search:
    changes = {"quality": {}, "search": {"points": POINTS}, "verify": {"top": 1, "restarts": 2}}
    search = Search(parse_study(merged(BASE, changes)), tmp_path, slots=2)
    search.begin()
    return search


def test_no_other_setting_is_started_before_the_baseline_has_answered(guarded: Search) -> None:
    assert guarded.suggest("a")["params"] == {}
    assert guarded.suggest("b") is None
    guarded.end("a", 100.0)
    asked = guarded.suggest("b")
    assert asked["params"] == POINTS[0]
    assert asked["reference"] == Quality(9.0, ("an answer",))


def test_a_baseline_that_was_lost_is_run_again_before_what_is_queued(guarded: Search) -> None:
    guarded.suggest("a")
    guarded.fail("a", BUSY)
    again = guarded.suggest("b")
    assert (again["params"], again["reference"]) == ({}, None)
    guarded.end("b", 100.0)
    assert [guarded.suggest(name)["params"] for name in ("c", "d")] == POINTS


def test_answers_of_a_baseline_that_failed_later_are_answers(guarded: Search) -> None:
    guarded.suggest("a")
    guarded.fail("a", replace(NO_MEMORY, stage=Stage.LOAD), "an answer")
    assert guarded.suggest("b")["reference"] == Quality(9.0, ("an answer",))


def test_answers_of_a_baseline_that_was_ended_under_load_are_answers(guarded: Search) -> None:
    guarded.suggest("a")
    write_result(guarded.folder.trial_dir(0, "a"), TrialResult({"perplexity": 9.0}, answers=("an answer",)), QUALITY)
    guarded.standing = Standing(Stage.LOAD, 0.5, started_at=1.0, moved_at=2.0, ended_by=Kind.HUNG, ended_at=9.0)
    guarded.searcher.on_trial_complete("a", error=True)
    row = guarded.reporter.row("a")
    assert row.result.failure is not None
    assert (row.result.failure.kind, row.result.metrics) == (Kind.HUNG, {"perplexity": 9.0})
    assert guarded.suggest("b")["reference"] == Quality(9.0, ("an answer",))


def test_without_any_answer_of_the_baseline_the_search_ends_and_says_why(guarded: Search) -> None:
    guarded.suggest("a")
    guarded.fail("a", NO_MEMORY)
    assert guarded.suggest("b") == Searcher.FINISHED
    assert "the baseline has given no answers that others could be held against" in str(guarded.reporter.ending)
