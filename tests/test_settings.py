"""Settings of the page: to the address and back, to thresholds, to the engine's configs."""

import pytest

from cascadeexit.config import Mode
from cascadeexit.settings import (
    DISABLED,
    MAX_EXITS,
    THRESHOLDS,
    Settings,
    exit_choices,
    first_threshold,
    from_query,
    limits,
    query_name,
    thresholds_at,
)
from cascadeexit.shape import Shape, exit_name

SHAPE = Shape("m", 6, (2, 3, 5), True)
SLIDERS = (0.5, 0.6, 1.0, 0.7)          # one more than the model has exits


def test_thresholds_rise_with_depth_and_only_the_end_of_the_slider_disables_exits():
    shape = Shape("m", 30, (0, 9, 17, 24), True)
    assert thresholds_at(0.5, shape)[:4] == [0.5, 0.65, 0.79, 0.9]
    assert thresholds_at(0.99, shape)[:4] == [0.99] * 4 and thresholds_at(DISABLED, shape) == [DISABLED] * MAX_EXITS
    assert len(thresholds_at(0.3, Shape("m", 30, (9, 24), True))) == MAX_EXITS


def test_an_exit_is_named_by_its_place():
    shape = Shape("m", 30, (0, 9), True)
    assert [exit_name(s, shape) for s in range(3)] == ["Exit 1 (before layer 1 of 30)", "Exit 2 (after layer 9 of 30)",
                                                       "Full model"]


def test_thresholds_that_follow_from_the_first_are_recognised():
    assert first_threshold(thresholds_at(0.4, SHAPE), SHAPE) == 0.4
    assert first_threshold([0.4, 0.4, 0.9], SHAPE) is None and first_threshold([], SHAPE) is None


def test_a_chosen_exit_writes_every_token():
    config, full = Settings(tolerance=0.3, exit_choice=1, thresholds=SLIDERS).decode_configs(3)
    assert config.thresholds == [None, 0.0, None] and full.mode == "full" and config.tolerance == 0


def test_a_slider_at_its_end_disables_its_exit():
    config, _ = Settings(seed=None, thresholds=SLIDERS).decode_configs(3)
    assert config.thresholds == [0.5, 0.6, None] and config.seed == 0


def test_the_menu_disables_an_exit():
    choice = exit_choices(SHAPE)["Disable exit 2"]
    config, _ = Settings(exit_choice=choice, thresholds=(0.5, 0.6, 0.9)).decode_configs(3)
    assert config.thresholds == [0.5, None, 0.9]


def test_verified_mode_keeps_its_own_thresholds_and_the_tolerance():
    config, full = Settings(mode="verified", tolerance=0.3, thresholds=SLIDERS).decode_configs(3)
    assert config.thresholds is None and config.tolerance == 0.3 and full.tolerance == 0


@pytest.mark.parametrize("name", ["max_new_tokens", "max_draft", "temperature", "top_p", "tolerance"])
def test_an_erased_value_is_refused_with_a_message(name):
    with pytest.raises(ValueError, match=f"A setting is empty: give {name} a value"):
        Settings(**{name: None}, thresholds=SLIDERS).decode_configs(3)


def test_controls_become_settings_by_name():
    values = {"prompt": "hi", "seed": 4, **dict(zip(THRESHOLDS, range(MAX_EXITS)))}
    assert Settings.from_controls(values) == Settings(prompt="hi", seed=4, thresholds=tuple(range(MAX_EXITS)))


def test_a_record_keeps_the_keys_of_recorded_runs():
    """Runs that were saved with these keys exist."""
    assert list(Settings().record()) == ["model", "prompt", "mode", "chat", "tokens", "drafts", "tolerance",
                                         "temperature", "top_p", "seed", "force", "thresholds", "beside"]


def test_every_setting_is_read_from_the_address():
    query = dict(model="b", p="a & b", mode="verified", chat="false", n="77", drafts="3", tol="0.3", temp="0.5",
                 top_p="0.9", seed="12", exit="-4", t="0.55,0.65,0.9,0.6,0.6,0.6", beside="Careful")
    found = from_query(query, {"a": Shape("a", 6, (3,), True), "b": SHAPE})
    assert Settings.from_controls(found) == Settings(
        "b", "a & b", Mode.VERIFIED, False, 77, 3, 0.3, 0.5, 0.9, 12, -4, (0.55, 0.65, 0.9, 0.6, 0.6, 0.6), "Careful")
    assert {query_name(name) for name in found} == set(query), "a link is written with the names that are read"


@pytest.mark.parametrize("query", [
    {"model": "other"}, {"mode": "warp"}, {"mode": "full"}, {"n": "many"}, {"temp": "1e999"}, {"temp": "nan"},
    {"t": "a,b"}, {"t": ""}, {"exit": "77"}, {"exit": "-5"}, {"seed": "nan"}, {"seed": "inf"}, {"unknown": "1"},
    {"beside": "me"}, {"chat": "maybe"}, {"tol": "nan"}, {"top_p": "nan"}, {"t": "nan,nan,nan,nan"}, {"n": "5000"},
    {"n": "-1"}, {"n": "9" * 5000}, {"top_p": "0"}, {"t": "2,x,-1"}, {"seed": "99999999999999999999"},
    {"seed": "1e300"}, {"p": "a" * 20_001}, {"temp": "2.05"}, {"drafts": "1e9"}, {"model": "a" * 10**5}])
def test_what_does_not_fit_in_an_address_leaves_the_control_as_it_was(query):
    assert from_query(query, {"a": SHAPE}) == {}


def test_numbers_at_the_limits_of_an_address_are_read():
    limit = limits("max_new_tokens").high
    found = from_query({"n": str(limit), "t": "1,x,0", "p": "a" * 20_000, "seed": "-3.5"}, {"a": SHAPE})
    assert found == dict(max_new_tokens=limit, threshold_1=1, threshold_3=0, prompt="a" * 20_000, seed=-3)
    assert from_query({"seed": str(2**53 - 1)}, {"a": SHAPE}) == dict(seed=2**53 - 1)


@pytest.mark.parametrize("name, value", [
    ("max_new_tokens", "many"), ("max_new_tokens", 7.5), ("max_new_tokens", True), ("max_draft", 10**9),
    ("temperature", float("nan")), ("temperature", "hot"), ("top_p", [1]), ("seed", "x"), ("seed", float("inf")),
    ("seed", 10**30), ("exit_choice", "x"), ("exit_choice", 99), ("mode", "w" * 10**5), ("mode", []), ("mode", None)],
    ids=lambda value: str(value)[:20])
def test_a_wrong_value_gets_one_short_sentence_with_its_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .* got ") as caught:
        Settings(**{"thresholds": SLIDERS, name: value}).decode_configs(3)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize("threshold", ["x", float("nan"), -1, True, [0.5]])
def test_a_wrong_threshold_is_named(threshold):
    with pytest.raises(ValueError, match="^each (of thresholds|threshold) must be .* got "):
        Settings(thresholds=(0.5, threshold, 0.5)).decode_configs(3)


def test_whole_numbers_that_a_browser_sends_as_floats_are_whole():
    config, _ = Settings(max_new_tokens=40.0, max_draft=5.0, seed=3.0, thresholds=SLIDERS).decode_configs(3)
    assert (config.max_new_tokens, config.max_draft, config.seed) == (40, 5, 3)
