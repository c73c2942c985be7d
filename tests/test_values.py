"""Values from outside: what is accepted, and how wrong ones are quoted."""

from fractions import Fraction

import numpy as np
import pytest

from cascadeexit.values import as_whole, first_line, flag, number, shown, whole


@pytest.mark.parametrize("value", ["x" * 10**6, 10**5000, [1] * 10**6, {i: i for i in range(10**5)}, [[[[[[1]]]]]] * 9,
                                   np.zeros(10**6), {"a": ["b" * 10**6]}, "a\nb" * 99, float("nan"), object()],
                         ids=lambda value: type(value).__name__)
def test_a_wrong_value_is_quoted_in_one_short_line(value):
    assert len(shown(value)) <= 63 and "\n" not in shown(value)


@pytest.mark.parametrize("value, words", [("warp", "'warp'"), ([1], "[1]"), (None, "None"), (True, "True"),
                                          (5, "5"), ({"a": 1}, "{'a': 1}")])
def test_a_short_value_is_quoted_as_it_is(value, words):
    assert shown(value) == words


@pytest.mark.parametrize("value", [5, np.int64(5), np.int8(5), np.uint64(5)])
def test_whole_numbers_of_any_kind_become_pythons_own(value):
    assert type(whole("n", value, 1, 9)) is int and whole("n", value, 1, 9) == 5


@pytest.mark.parametrize("value", [5.0, True, np.bool_(True), "5", None, [5], 0, 10, 10**400, float("nan"), 5j])
def test_what_is_no_whole_number_within_the_limits_is_refused(value):
    with pytest.raises(ValueError, match="n must be a whole number from 1 to 9, got"):
        whole("n", value, 1, 9)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float16(0.5), Fraction(1, 2)])
def test_numbers_of_any_kind_become_pythons_own(value):
    assert type(number("x", value, 0, 1)) is float and number("x", value, 0, 1) == 0.5


@pytest.mark.parametrize("value", [True, "0.5", None, float("nan"), float("inf"), np.float32("nan"), -0.1, 2, 10**400,
                                   [0.5], 5j])
def test_what_is_no_number_within_the_limits_is_refused(value):
    with pytest.raises(ValueError, match="x must be a number from 0 to 1, got"):
        number("x", value, 0, 1)
    with pytest.raises(ValueError, match="x must be a finite number, got nan"):
        number("x", float("nan"))


def test_a_flag_is_true_or_false():
    assert flag("f", True) is True and flag("f", False) is False
    with pytest.raises(ValueError, match="f must be true or false, got 1"):
        flag("f", 1)


def test_only_whole_floats_become_whole_numbers():
    assert type(as_whole(8.0)) is int and as_whole(8.5) == 8.5 and as_whole("8.0") == "8.0" and as_whole(True) is True


def test_errors_are_told_in_one_line_of_limited_length():
    assert first_line(KeyError("a")) == "KeyError: 'a'" and first_line(ValueError("")) == "ValueError: "
    assert len(first_line(ValueError("x" * 999 + "\ny"))) == 200
