"""Thresholds for a wanted agreement, the measured curve, the menu of models, the front matter of a Space."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import SpaceHardware
from packaging.requirements import Requirement

import app
from cascadeexit import hub
from cascadeexit.calibration import Calibration, Point
from cascadeexit.exits import ExitBank
from cascadeexit.library import Library, Offer
from cascadeexit.page import percent_at, quality_stops, threshold_for
from cascadeexit.report import measured_curve
from cascadeexit.settings import DISABLED

CALIBRATION = Calibration("exits", 300, 64, 0.1, tuple(
    Point(t, bound / 2, bound, 1.0) for t, bound in ((0.9, 0.02), (0.7, 0.052), (0.5, 0.2))))


@pytest.mark.parametrize("wanted, threshold", [(80, 0.5), (81, 0.7), (94, 0.7), (95, 0.9), (98, 0.9), (99, DISABLED),
                                               (50, 0.5)])
def test_a_wanted_agreement_becomes_the_loosest_threshold_certified_to_keep_it(wanted, threshold):
    assert threshold_for(wanted, CALIBRATION) == threshold


@pytest.mark.parametrize("threshold, percent", [(0.5, 80), (0.6, 80), (0.7, 94), (0.95, 98), (0.4, 0)])
def test_a_threshold_shows_the_agreement_that_is_certified_there(threshold, percent):
    assert percent_at(threshold, CALIBRATION) == percent


def test_every_stop_of_the_quality_slider_changes_the_thresholds_and_no_other_position_does():
    stops = quality_stops(CALIBRATION)
    assert stops == [80, 94, 98]
    for percent in range(50, 100):
        threshold = threshold_for(percent, CALIBRATION)
        stop = next((stop for stop in stops if stop >= percent), None)
        assert threshold == (DISABLED if stop is None else threshold_for(stop, CALIBRATION))
        assert stop is None or percent_at(threshold, CALIBRATION) == stop, "the slider can move to its stop"
    assert len({threshold_for(stop, CALIBRATION) for stop in stops}) == len(stops)


def test_thresholds_that_are_certified_for_the_same_percentage_share_a_stop():
    points = tuple(Point(t, bound / 2, bound, 1.0) for t, bound in ((0.9, 0.062), (0.8, 0.069), (0.7, 0.07)))
    equal = Calibration("exits", 300, 64, 0.1, points)
    assert quality_stops(equal) == [93] and threshold_for(93, equal) == 0.7


def test_the_shipped_quality_slider_has_stops():
    folder = Path(__file__).parents[1] / "assets" / "exits" / hub.DEFAULT_MODEL
    stops = quality_stops(Calibration.load(folder))
    assert len(stops) >= 5 and 50 <= stops[0] < stops[-1] < 99


def test_the_measured_curve_is_that_of_the_shipped_exits():
    """New exits must be measured before they ship: the quality slider and the curve would be those of other exits."""
    library = Library([Offer(hub.DEFAULT_MODEL, hub.DEFAULT_MODEL)])
    curve = measured_curve(library.fingerprint(hub.DEFAULT_MODEL))
    assert len(curve) >= 5 and measured_curve("other exits") == []
    for point in curve:
        assert {"threshold", "agreement", "cost"} <= set(point)


def test_without_options_every_kind_of_shipped_exits_is_offered(monkeypatch):
    monkeypatch.delenv("CASCADEEXIT_MODEL", raising=False)
    offered = app.offers([], None)
    assert offered[0].model is None and offered[0].exits is None
    assert all(offer.exits.is_dir() for offer in offered[1:])
    assert [offer.label for offer in app.offers(["./a", "b/C"], None)] == ["a", "c"]
    monkeypatch.setenv("CASCADEEXIT_MODEL", "./mine")
    assert [(o.label, o.model) for o in app.offers([], None)] == [("mine", "./mine")]


def test_the_front_matter_tells_a_space_what_the_page_needs():
    root = Path(app.__file__).parent
    readme = (root / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(re.match("---\n(.*?)\n---\n", readme, re.DOTALL)[1])
    needs = {r.name: r for line in (root / "requirements.txt").read_text().splitlines()
             if (r := Requirement(line.split("#")[0].strip()))}
    assert front["sdk"] == "gradio" and needs["gradio"].specifier.contains(front["sdk_version"])
    assert (root / front["app_file"]).is_file() and front["python_version"] == "3.12"
    assert (root / front["thumbnail"]).is_file() and len(front["short_description"]) <= 60
    assert front["models"] and front["tags"] and front["suggested_hardware"] in {*SpaceHardware}
    assert needs["torch"].specifier.contains("2.11.0"), "the newest that ZeroGPU offered in August 2026"
    assert "g++" in (root / "packages.txt").read_text().split(), "a CPU Space compiles our kernels"


def test_the_recorded_run_was_made_with_the_shipped_exits():
    """Retake it after a change of the exits: python -m tests.browser.screenshots."""
    records = json.loads(app.TRACE.read_text(encoding="utf-8"))["records"]
    run = next(record for record in records if record["type"] == "run")
    shipped = ExitBank.load(hub.find_exits(hub.DEFAULT_MODEL, None))
    assert run["settings"]["exits"] == shipped.fingerprint()


def test_no_two_scripts_of_the_page_declare_one_name():
    """They share one scope, in which a second function would silently replace the first."""
    files = {path.stem for path in (app.ASSETS / "page").glob("*.js")}
    assert set(app.SCRIPTS) == files and len(app.SCRIPTS) == len(files) and app.SCRIPTS[-1] == "main"
    names = re.findall(r"^(?:async )?(?:function|const|let|class) (\w+)", app.page_script(), flags=re.MULTILINE)
    assert len(names) > 100 and [name for name in set(names) if names.count(name) > 1] == []
