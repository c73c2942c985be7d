"""The report: one HTML page of all results. It needs no network, and its numbers are those of the JSON files."""

import html
import json
import re
import shutil

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

import app
from training import charts, findings, report, results

RESULTS = results.ROOT / "assets" / "results"
FILES = sorted(path.name for path in RESULTS.glob("*.json"))
TYPED = r"\d+(\.\d+)?\s?(x\b|%|tokens/s|GB/s|ms\b)"


@pytest.fixture(scope="module")
def page() -> str:
    return report.page()


@pytest.fixture
def copy(tmp_path):
    """A root with copies of the result files and of the reports of the shipped exits."""
    shutil.copytree(RESULTS, tmp_path / "assets" / "results")
    shutil.copytree(RESULTS.parent / "exits", tmp_path / "assets" / "exits",
                    ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path


def words(page: str) -> str:
    """Return the text of a page, without tags and styles, with single spaces."""
    text = re.sub(r"<[^>]*>", "", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    return re.sub(r"\s+", " ", html.unescape(text))


def test_every_result_file_is_shown(page):
    assert FILES and not [name for name in FILES if name not in words(page)]
    assert "Result files that this page does not show" not in page


def test_a_file_that_the_report_does_not_know_is_named(copy):
    shutil.copy(RESULTS / "decode.json", copy / "assets" / "results" / "surprise-1.json")
    shown = words(report.page(copy))
    assert "Result files that this page does not show" in shown and "surprise-1.json" in shown


def test_the_page_is_one_file_without_scripts(page):
    assert not re.search(r"https?:|//\w|<script|<link|<img|<iframe|@import|url\(|\ssrc=|\son\w+=", page)
    assert set(re.findall(r'href="([^"]*)"', page)) <= {f'#{name}' for name in re.findall(r'id="([^"]*)"', page)}
    assert len(page) < 300_000


def test_the_same_files_give_the_same_page(page, copy):
    assert report.page() == page == report.page(copy)


def test_the_page_is_built_without_any_result(tmp_path):
    shown = words(report.page(tmp_path))
    assert "Nothing can be concluded yet" in shown and "Published figures and ours" in shown
    assert all(what in shown for _, what, _ in findings.EXPECTED)


@pytest.mark.parametrize("name", [*FILES, "calibration.json", "confidence.json", "distill.json", "drafter.json"])
def test_the_page_is_built_without_one_file(name, copy):
    for path in copy.rglob(name):
        path.unlink()
    assert "</html>" in report.page(copy)


def test_what_is_missing_is_said_and_what_is_there_is_not(page, copy):
    """No result comes from a GPU, so the page must say so; without baselines.json it must say that, too."""
    kinds = {gap.what for gap in findings.gaps(results.read_all(results.ROOT))}
    missing = {what for pattern, what, _ in findings.EXPECTED if not list(RESULTS.glob(findings.file_name(pattern)))}
    assert missing <= kinds and not kinds & ({what for _, what, _ in findings.EXPECTED} - missing)
    assert ("GPU: nothing was run." in words(page)) == (not list(RESULTS.glob("gpu-*.json")))
    (copy / "assets" / "results" / "baselines.json").unlink()
    assert "The published setting, without a KV cache" in {gap.what for gap in findings.gaps(results.read_all(copy))}


def test_numbers_are_those_of_the_files(page):
    shown = words(page)
    benchmark = results.read(RESULTS / "benchmark-cpu.json")
    verified = benchmark["rows"]["verified"]
    assert (f"at {verified['over_full']:.2f}x the speed of our full pass and {verified['over_generate']:.1f}x that of "
            f"transformers generate on {benchmark['provenance']['machine']}") in shown
    lossless = results.read(RESULTS / "lossless-cpu-bfloat16.json")
    assert f"{lossless['verified_tokens']:,} tokens of verified" in shown
    calibration = results.read(results.exits_folders(results.ROOT)[0] / "calibration.json")
    for point in calibration["points"]:
        assert (f"<td>{point['threshold']}</td><td>{point['disagreement']:.1%}</td><td>{point['at_most']:.1%}</td>"
                in page)


def test_numbers_follow_the_files(copy):
    file = copy / "assets" / "results" / "benchmark-cpu.json"
    content = results.read(file)
    content["rows"]["verified"] |= {"over_full": 3.21, "over_generate": 45.67}
    file.write_text(json.dumps(content), encoding="utf-8")
    assert "at 3.21x the speed of our full pass and 45.7x that of" in words(report.page(copy))


def test_no_number_is_typed_into_the_template():
    template = (results.ROOT / "training" / "templates" / "report.html").read_text(encoding="utf-8")
    assert not re.search(TYPED, re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", template, flags=re.DOTALL))


def test_a_cascade_is_beaten_only_by_a_setting_that_is_as_fast_and_as_close():
    rows = {"cascade 0.8": {"over_full": 1.2, "agreement": 0.95}, "cascade 0.4": {"over_full": 2.0, "agreement": 0.8},
            "verified": {"over_full": 1.2, "agreement": 1.0}, "full": {"over_full": 3.0, "agreement": 1.0}}
    assert findings.beaten(rows) == ["cascade 0.8"]


@pytest.mark.parametrize("values, wanted", [([0.0, 1.0], [0, 0.2, 0.4, 0.6, 0.8, 1]), ([0.74, 1.0], [0.7, 0.75, 1.0]),
                                            ([3.0], [3.0, 3.5]), ([0.0, 0.0], [0.0])])
def test_an_axis_has_round_ticks_that_cover_the_values(values, wanted):
    axis = charts.Axis.round("", values, str)
    assert set(wanted) <= set(axis.ticks) and axis.low <= min(values) and axis.high >= max(values) > axis.low - 1
    assert 2 <= len(axis.ticks) <= 8 and axis.share(axis.low) == 0 and axis.share(axis.high) == 1


def test_labels_of_a_chart_are_escaped():
    axis = charts.Axis.round("<x>", [0, 1], str)
    drawn = charts.chart("<b>", [charts.Series("<s>", "full", [(0, 0, "<i>"), (1, 1, "")])], axis, axis)
    assert not re.search(r"<[bixs]>", drawn) and "&lt;i&gt;" in drawn


def test_the_app_serves_the_report(page):
    client = TestClient(Starlette(routes=app.report_routes()))
    answer = client.get("/report")
    assert answer.status_code == 200 and answer.text == page and answer.headers["content-type"].startswith("text/html")


def test_without_the_package_training_there_is_no_route(monkeypatch):
    monkeypatch.setattr(app, "report", None)
    assert app.report_routes() == []
