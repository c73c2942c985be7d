"""What the page decides by itself: thresholds for a wanted quality, settings from a link, the menu of models."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import app
from cascadeexit import hub
from cascadeexit.calibration import Calibration, Point
from cascadeexit.library import Library, Offer
from cascadeexit.shape import Shape

CALIBRATION = Calibration("exits", 300, 64, 0.1, tuple(
    Point(t, bound / 2, bound, 1.0) for t, bound in ((0.9, 0.02), (0.7, 0.052), (0.5, 0.2))))


@pytest.mark.parametrize("wanted, threshold", [(80, 0.5), (81, 0.7), (94, 0.7), (95, 0.9), (98, 0.9), (99, app.NEVER),
                                               (50, 0.5)])
def test_a_wanted_agreement_becomes_the_loosest_threshold_that_is_sure_to_keep_it(wanted, threshold):
    assert app.threshold_for(wanted, CALIBRATION) == threshold


@pytest.mark.parametrize("threshold, percent", [(0.5, 80), (0.6, 80), (0.7, 94), (0.95, 98), (0.4, 0)])
def test_a_threshold_shows_the_agreement_that_is_sure_there(threshold, percent):
    assert app.percent_at(threshold, CALIBRATION) == percent


def test_sliders_at_one_price_rise_with_depth_and_only_the_end_closes_exits():
    shape = Shape("m", 30, (0, 9, 17, 24), True)
    assert app.sliders_at(0.5, shape)[:4] == [0.5, 0.65, 0.79, 0.9]
    assert app.sliders_at(0.99, shape)[:4] == [0.99] * 4 and app.sliders_at(1.0, shape) == [1.0] * app.MAX_EXITS
    assert len(app.sliders_at(0.3, Shape("m", 30, (9, 24), True))) == app.MAX_EXITS


def test_the_measured_curve_is_that_of_the_shipped_exits():
    """Whoever ships new exits measures them: the quality dial would lie otherwise."""
    library = Library([Offer(hub.DEFAULT_MODEL, hub.DEFAULT_MODEL)])
    curve = app.measured_curve(library.fingerprint(hub.DEFAULT_MODEL))
    assert len(curve) >= 5 and app.measured_curve("other exits") == []
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


def test_forced_exits_and_closed_ones():
    config, full = app.decode_configs(3, "cascade", 10, 4, 0.3, 0.0, 1.0, 0, 1, [0.5, 0.6, 1.0, 0.7])
    assert config.thresholds == [None, 0.0, None] and full.mode == "full" and config.tolerance == 0
    config, _ = app.decode_configs(3, "cascade", 10, 4, 0.3, 0.0, 1.0, None, app.FIRST_SURE, [0.5, 0.6, 1.0, 0.7])
    assert config.thresholds == [0.5, 0.6, None]
    config, _ = app.decode_configs(3, "verified", 10, 4, 0.3, 0.0, 1.0, None, app.FIRST_SURE, [0.5, 0.6, 1.0, 0.7])
    assert config.thresholds is None, "verified has a rule of its own"
    assert config.tolerance == 0.3 and full.tolerance == 0
    without_2 = next(value for name, value in app._ways_out(Shape("m", 6, (2, 3, 5), True))["choices"]
                     if name == "Never at exit 2")
    config, _ = app.decode_configs(3, "cascade", 10, 4, 0.3, 0.0, 1.0, 0, without_2, [0.5, 0.6, 0.9, 0.7])
    assert config.thresholds == [0.5, None, 0.9]
    with pytest.raises(ValueError, match="A setting is empty"):
        app.decode_configs(3, "cascade", None, 4, 0.3, 0.0, 1.0, 0, app.FIRST_SURE, [0.5] * 3)


def test_a_space_is_told_what_the_page_needs():
    root = Path(app.__file__).parent
    told = yaml.safe_load(re.match("---\n(.*?)\n---\n", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1])
    needs = {r.name: r for line in (root / "requirements.txt").read_text().splitlines()
             if (r := Requirement(line.split("#")[0].strip()))}
    assert told["sdk"] == "gradio" and needs["gradio"].specifier.contains(told["sdk_version"])
    assert (root / told["app_file"]).is_file() and told["python_version"] == "3.12"
