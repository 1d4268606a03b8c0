"""report.html: whole, self-contained, harmless, and about studies of every kind."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from raytune_autotuner.cli import main
from raytune_autotuner.report.html.charts import trade_off
from raytune_autotuner.report.html.evidence import gather
from raytune_autotuner.report.html.failing import grouped
from raytune_autotuner.report.html.figures import BAD, FAINT
from raytune_autotuner.report.html.importance import importance_for_failing, importance_for_score
from raytune_autotuner.report.html.page import report_page, write_report
from raytune_autotuner.report.html.sections import versus
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.verdict import study_verdict
from raytune_autotuner.study.trial import State, TrialRow
from tests.report_samples import (
    BASE,
    NO_MEMORY,
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
from tests.study_folders import make_folder, whole_study

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"
CHARTS = {
    "convergence",
    "front",
    "restarts",
    "parallel",
    "importance-score",
    "importance-failing",
    "failure-map",
    "failing-values",
    "distributions",
    "over-time",
    "load-latency",
}


class Elements(HTMLParser):
    """The elements of a page, with their attributes, and its text outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.texts.append(data)

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag == name]

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def page_of(folder: ResultsFolder) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def figures_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)
    assert found is not None
    figures: dict[str, Any] = json.loads(found[1])
    return figures


def painted(value: Any) -> Any:
    """A figure with a real colour in place of the page's names."""
    if isinstance(value, dict):
        return {key: painted(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [painted(inner) for inner in value]
    return "#123456" if isinstance(value, str) and value.startswith("--") else value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ResultsFolder:
    return whole_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def page(folder: ResultsFolder) -> str:
    return page_of(folder)


def test_the_report_says_the_verdict_and_how_to_serve_it(folder: ResultsFolder, page: str) -> None:
    text = Elements(page).text
    answer = study_verdict(folder.load_study(), folder.read_rows())
    assert answer.sentence in text
    assert answer.interval is not None
    assert "A=1 vllm serve the-model --max-num-seqs 11" in text
    for fact in ("0.32.0", "EPYC", "search 0, workload 0", "D(128,32)"):
        assert fact in text


@pytest.mark.parametrize(
    ("again_of", "basis"),
    [
        ({0: BASE, 2: BASE}, "Means of 5 engine starts each."),  # not trial 1, which nobody has measured again
        ({0: BASE}, "One measurement each."),
        ({0: BASE[:1], 2: BASE}, "Means of 1 and 5 engine starts."),
    ],
)
def test_baseline_and_rival_are_compared_by_what_both_have(
    tmp_path: Path, again_of: dict[int, tuple[float, ...]], basis: str
) -> None:
    rows = [measured(0, 60.0), measured(1, 120.0, setting(16)), measured(2, 119.0, setting(8))]
    out = [again(60, rows[0], 1)] if again_of[0] != BASE else []
    evidence = gather(make_folder(tmp_path, [*verified(rows, again_of), *out]))
    text = Elements(str(versus(evidence))).text
    assert basis in text
    assert f"trial {2 if 2 in again_of else 1}" in text


def test_every_chart_of_a_whole_study_is_drawn_as_plotly_wants_it(page: str) -> None:
    figures = figures_of(page)
    assert (
        set(figures)
        == CHARTS
        == {place["data-chart"] for place in Elements(page).named("div") if "data-chart" in place}
    )
    for figure in figures.values():
        drawn = go.Figure(painted(figure))  # raises for a property that Plotly does not know
        assert len(drawn.data) > 0


def test_every_trial_is_a_row_with_its_logs(folder: ResultsFolder, page: str) -> None:
    rows = [one for one in Elements(page).named("tr") if "data-state" in one]
    assert len(rows) == len(folder.read_rows())
    links = [one["href"] for one in Elements(page).named("a") if one["href"] and one["href"].endswith(".log")]
    assert "trials/0-abc_00000/engine.log" in links
    assert not [link for link in links if not (folder.path / str(link)).is_file()]


def test_the_report_asks_for_nothing_outside_itself(page: str) -> None:
    for name, attributes in Elements(page).found:
        assert not attributes.get("src"), name
        assert not str(attributes.get("href") or "").startswith(("http", "//")), name
    (policy,) = [one["content"] for one in Elements(page).named("meta") if "http-equiv" in one]
    assert policy is not None
    assert policy.startswith("default-src 'none';")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], ["No trial has started yet.", "Nothing was measured: no trial ended.", "There is no baseline"]),
        ([failed(0), failed(1, setting(4))], ["The baseline has no figures: it is failed", "Nothing was measured"]),
        ([measured(0, 100.0)], ["No other setting has been measured.", "No trial has failed."]),
        ([measured(3, 120.0, setting(4))], ["There is no baseline, so nothing can be compared"]),
        ([running(0)], ["No trial has ended yet."]),
        ([replace(measured(0, 100.0), state=State.LOST, score=None, violation=None)], ["No trial has ended yet."]),
        (sample_rows(), ["Nothing has been measured again yet."]),
        (verified_rows(), ["has left no command.json", "No trial has left its requests"]),
        ([measured(n, 100.0 + n, setting(n - 3, 77, bind="x")) for n in range(9)], ["There is no baseline"]),
    ],
    ids=[
        "none",
        "all failed",
        "baseline only",
        "no baseline",
        "running",
        "lost",
        "not verified",
        "no files",
        "outside the space",
    ],
)
def test_an_empty_part_says_why_it_is_empty(tmp_path: Path, rows: list[TrialRow], said: list[str]) -> None:
    text = Elements(page_of(make_folder(tmp_path, rows))).text
    for words in said:
        assert words in text


def test_a_folder_with_nothing_but_its_study_makes_a_report(tmp_path: Path) -> None:
    folder = ResultsFolder.create(tmp_path, make_study())
    assert "The study has not begun." in Elements(page_of(folder)).text


def test_a_killed_and_a_running_study_are_called_so(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, sample_rows(), phase="running")
    assert "The study still runs" in Elements(page_of(folder)).text
    status = json.loads(folder.status_file.read_text())
    folder.status_file.write_text(json.dumps({**status, "pid_started": 1}))
    assert "The study was killed" in Elements(page_of(folder)).text


def test_broken_files_of_a_trial_leave_its_charts_out(tmp_path: Path) -> None:
    folder = whole_study(tmp_path, 4)
    for path in folder.trials_dir.rglob("*.parquet"):
        path.write_bytes(b"not parquet")
    for path in folder.trials_dir.rglob("command.json"):
        path.write_text("{")
    assert "No trial has left its requests" in Elements(page_of(folder)).text


def hostile_study(parent: Path) -> ResultsFolder:
    """A study whose values, names and evidence are markup."""
    space = {"max-num-seqs": {"int": [1, 64]}, "chat-template": {"choice": [HOSTILE, "plain"]}}
    study = make_study(search_space=space, model=f"/models/{HOSTILE}", constraints=[])
    cause = replace(NO_MEMORY, evidence=HOSTILE, remedy=HOSTILE)
    rows = [measured(0, 100.0)]
    for number in range(1, 9):
        params = {"max-num-seqs": number, "chat-template": (HOSTILE, "plain")[number % 2]}
        rows.append(failed(number, params, cause) if number % 4 == 0 else measured(number, 90.0 + number, params))
    return make_folder(parent, rows, study)


def test_hostile_values_are_text_and_nothing_else(tmp_path: Path) -> None:
    elements = Elements(page := page_of(hostile_study(tmp_path)))
    assert len(elements.named("script")) == 3
    assert not elements.named("img")
    assert not [a for _, attributes in elements.found for a in attributes if a.startswith("on")]
    assert HOSTILE in elements.text.replace("  ", " ")
    assert "<img" not in json.dumps(figures_of(page))


def test_secrets_are_masked(tmp_path: Path) -> None:
    token = "hf_abcdefghijklmnop"
    study = make_study(engine={"kind": "simulated", "env": {"HF_TOKEN": token}}, constraints=[])
    folder = make_folder(
        tmp_path, [measured(0, 100.0), measured(1, 120.0, {"max-num-seqs": 4, "env:API_KEY": token})], study
    )
    # As another program might leave them.
    folder.rows_file.write_text(folder.rows_file.read_text().replace("***", token))
    assert token not in page_of(folder)


@pytest.mark.slow
def test_two_hundred_trials_fit_into_six_megabytes(tmp_path: Path) -> None:
    path = write_report(whole_study(tmp_path, 200))
    assert path.stat().st_size < 6_000_000


def test_what_breaks_the_engine_is_what_matters_for_failing(tmp_path: Path) -> None:
    rows = [measured(0, 100.0)]
    for number in range(1, 31):
        params = setting(number, (16, 32, 64)[number % 3])
        rows.append(failed(number, params) if number % 3 == 0 else measured(number, 100.0 + number, params))
    evidence = gather(make_folder(tmp_path, rows))
    breaking, scoring = importance_for_failing(evidence), importance_for_score(evidence)
    assert breaking.traces[0]["y"][-1] == "block-size"
    assert breaking.traces[0]["x"][-1] > 0.8
    assert scoring.traces[0]["y"][-1] == "max-num-seqs"


def test_a_parameter_that_does_not_matter_is_grey(tmp_path: Path) -> None:
    rows = [measured(0, 100.0)]
    for number in range(1, 31):
        params = setting(1 + number * 37 % 64, (16, 32, 64)[number % 3])
        rows.append(failed(number, params) if number % 3 == 0 else measured(number, 100.0, params))
    bars, _ = importance_for_failing(gather(make_folder(tmp_path, rows))).traces
    colors = dict(zip(bars["y"], bars["marker"]["color"], strict=True))
    assert colors == {"block-size": BAD, "max-num-seqs": FAINT}


def test_equal_values_are_never_split_into_two_groups(tmp_path: Path) -> None:
    numbers = [1, 2, 2, 2, 2, 3, 4, 5, 6, 7, 8, 8]
    rows = [measured(i, 100.0, setting(value)) for i, value in enumerate(numbers)]
    evidence = gather(make_folder(tmp_path, rows))
    groups = grouped(evidence, rows, "max-num-seqs")
    assert sum(group.ended for group in groups) == len(numbers)
    assert groups[0].text == "1 to 2"


def test_several_objectives_are_drawn_as_a_front_with_their_limits(tmp_path: Path) -> None:
    study = make_study(
        objective={"maximize": "output_throughput_tok_s", "minimize": "ttft_ms_p90", "slo": {"ttft_ms": {"p90": 3000}}}
    )
    points = {0: (100.0, 50.0), 1: (140.0, 80.0), 2: (90.0, 90.0), 3: (120.0, 40.0)}
    rows = [
        replace(measured(n, score, setting(n) if n else None), scores=(score, latency))
        for n, (score, latency) in points.items()
    ]
    front = figures_of(report_page(gather(make_folder(tmp_path, rows, study))))["front"]
    (line,) = [trace for trace in front["data"] if trace["name"] == "Pareto front"]
    assert list(zip(line["x"], line["y"], strict=True)) == [(120.0, 40.0), (140.0, 80.0)]
    assert front["layout"]["shapes"][0]["y0"] == 3000


def test_where_the_highest_load_is_looked_for_the_latency_is_that_of_the_level_that_is_judged(tmp_path: Path) -> None:
    objective = {"maximize": "max_load_under_slo", "slo": {"ttft_ms": {"mean": 100}}}
    study = make_study(workload={"concurrency": [4, 16]}, objective=objective)
    row = measured(0, 4.0)
    row = replace(row, result=replace(row.result, metrics={"ttft_ms_mean@c4": 50.0, "ttft_ms_mean@c16": 900.0}))
    chart = trade_off(gather(make_folder(tmp_path, [row], study)))
    assert [trace["x"] for trace in chart.traces] == [[50.0]]
    assert "at c4, where SLOs must be kept" in chart.note


def test_the_command_writes_the_report_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path, sample_rows())
    assert main(["report", str(folder.path)]) == 0
    assert capsys.readouterr().out == f"{folder.path / 'report.html'}\n"
    assert (folder.path / "report.html").is_file()


# In a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # Parallel coordinates draw with WebGL, which a machine without a GPU has in software only.
    for argument in ("--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"):
        options.add_argument(argument)
    options.add_argument("--window-size=1280,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def drawn(browser: Any, path: Path) -> Any:
    """The page, once all of its charts are there."""
    browser.get(path.as_uri())
    deadline = time.monotonic() + 120
    while browser.execute_script("return document.documentElement.dataset.drawn") is None:
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.1)
    return browser


def complaints(browser: Any) -> list[Any]:
    """What the console holds, less the graphics driver's own remarks on speed."""
    return [one for one in browser.get_log("browser") if "GL Driver Message" not in one["message"]]


def shown_rows(browser: Any) -> list[str]:
    script = (
        "return [...document.querySelectorAll('#trial-table tbody tr:not([hidden])')].map(r => r.cells[0].textContent)"
    )
    found: list[str] = browser.execute_script(script)
    return found


def click_head(browser: Any, name: str) -> None:
    script = (
        "[...document.querySelectorAll('#trial-table th button')].find(b => b.textContent === arguments[0]).click()"
    )
    browser.execute_script(script, name)


def put(browser: Any, field: str, value: str) -> None:
    script = (
        "const f = document.getElementById(arguments[0]); f.value = arguments[1]; f.dispatchEvent(new Event('input'))"
    )
    browser.execute_script(script, field, value)


@pytest.mark.slow
def test_a_browser_draws_every_chart_and_complains_of_nothing(browser: Any, folder: ResultsFolder) -> None:
    drawn(browser, write_report(folder))
    counts = browser.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('.chart')].map(c => [c.dataset.chart,"
        " c.querySelectorAll('.trace path, .trace .point, .heatmaplayer image, .parcoords .y-axis').length]))"
    )
    assert set(counts) == CHARTS
    assert all(counts.values()), counts
    assert complaints(browser) == []


@pytest.mark.slow
def test_the_table_sorts_filters_and_searches(browser: Any, folder: ResultsFolder) -> None:
    drawn(browser, write_report(folder))
    rows = {str(row.number): row for row in folder.read_rows()}
    assert shown_rows(browser) == list(rows)
    click_head(browser, "output_throughput_tok_stokens/s")
    scores = [rows[number].score for number in shown_rows(browser)]
    known = [score for score in scores if score is not None]
    assert known == sorted(known)
    assert scores[: len(known)] == known  # rows without a score come last
    click_head(browser, "output_throughput_tok_stokens/s")
    assert rows[shown_rows(browser)[0]].score == max(known)
    put(browser, "trial-state", "failed")
    assert {rows[number].state for number in shown_rows(browser)} == {State.FAILED}
    put(browser, "trial-search", "hung")
    assert {str(rows[number].result.failure.kind) for number in shown_rows(browser)} == {"hung"}  # type: ignore[union-attr]
    put(browser, "trial-state", "")
    put(browser, "trial-search", "")
    put(browser, "trial-role", "restart")
    assert all(rows[number].verifies is not None for number in shown_rows(browser))


@pytest.mark.slow
def test_the_charts_under_load_show_the_trials_that_are_ticked(browser: Any, folder: ResultsFolder) -> None:
    drawn(browser, write_report(folder))
    lines = "return document.querySelectorAll('[data-chart=distributions] .scatterlayer .trace').length"
    assert browser.execute_script(lines) == 2
    browser.execute_script("document.querySelectorAll('#load-controls input')[2].click()")
    time.sleep(0.5)
    assert browser.execute_script(lines) == 3
    before = browser.execute_script("return document.querySelector('[data-chart=distributions]').data[0].visible")
    change = "const s = document.getElementById('load-level'); s.value = 'c4';"
    browser.execute_script(f"{change} s.dispatchEvent(new Event('change', {{bubbles: true}}))")
    time.sleep(0.5)
    assert (
        browser.execute_script("return document.querySelector('[data-chart=distributions]').data[0].visible") != before
    )


@pytest.mark.slow
def test_the_launch_line_is_copied_and_the_theme_changes(browser: Any, folder: ResultsFolder) -> None:
    drawn(browser, write_report(folder))
    browser.execute_script("document.querySelector('button.copy').click()")
    time.sleep(0.3)
    assert browser.execute_script("return document.querySelector('button.copy').textContent") == "Copied"
    ink = "return getComputedStyle(document.body).color"
    before = browser.execute_script(ink)
    browser.execute_script("document.getElementById('theme').click()")
    assert browser.execute_script(ink) != before


@pytest.mark.slow
def test_a_hostile_study_runs_nothing_in_the_browser(browser: Any, tmp_path: Path) -> None:
    drawn(browser, write_report(hostile_study(tmp_path)))
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    assert complaints(browser) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "phone"])
def test_the_page_is_no_wider_than_its_window(browser: Any, folder: ResultsFolder, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 640}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        drawn(browser, write_report(folder))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
