"""Colours of the exits."""

from cascadeexit.stream import colours


def test_every_segment_has_a_colour_and_the_full_model_its_own():
    for num_exits in (1, 3, 6, 9):
        palette = colours(num_exits)
        assert len(palette) == num_exits + 1 and palette[-1] not in palette[:-1]
