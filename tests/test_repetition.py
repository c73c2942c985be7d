"""Loops are found at the end of a text; intended repetition is not. Most loops are the bundled model's own."""

import pytest
from transformers import AutoTokenizer

from cascadeexit.hub import bundled_model
from cascadeexit.repetition import LONGEST_PERIOD, Loop, find_loop

TIRED = ("I'm here to support you. If you're having a tough day, I can offer some advice on how to manage your stress "
         "and stay focused. ")
LOOPS = {
    "one word": "def is_even(n):\n    return n == 1" + "0" * 60,
    "emoji": "🍕🔥😀🍕" + "🔥" * 30,
    "a phrase": "The tower was built in 1902" + ", and it was built in 1902" * 6 + ", and it",
    "a line": "Bien sûr, je ne sais qu'un chat est toujeur.\n\n" + "Je ne sais qu'un chat est toujeur.\n\n" * 5,
    "code": "def is_palindrome_word(word):\n    return word == str(word)\n\n" * 4 + "def is_palindrome_word(word",
    "a long sentence, cut off": "I am sorry for your lack of sleep. " + TIRED * 2 + TIRED[:len(TIRED) // 2],
    "a full stop and an end": "The story" + " of the story" * 12 + ".<|im_end|>",
}
OTHERS = {
    "a list with counters": "".join(
        f"{i}. {c}: {c} is the most popular colour among fruits, and it is also the most popular colour among humans.\n"
        for i, c in enumerate(("Red", "Green", "Blue", "Yellow", "White"), 1)),
    "code given twice": "```python\ndef reverse_string(input_str):\n    return input_str[::-1]\n```\n" * 2,
    "similar lines of code": "".join(f"elif n <= {n}:\n    return n\n" for n in range(1, 9)),
    "a page": "<ul>\n" + "  <li>Item</li>\n" * 3 + "</ul>\n</body>\n</html>",
    "a row of emoji": "I love pizza! " + "🍕" * 8,
    "a table": "| name | age | town |\n|" + " --- |" * 3 + "\n| Ada | 36 | London |\n| Alan | 41 | London |\n",
    "a poem with a refrain": "".join(
        f"{verse}\nAnd the lamp goes round, and the lamp goes round,\nAnd the ships come home to the shore.\n\n"
        for verse in ("The night is long and the wind is cold,", "The keeper climbs as his father did,",
                      "The gulls are asleep on the harbour wall,")),
    "a chorus sung twice": "Row, row, row your boat, gently down the stream,\nmerrily, merrily.\n" * 2,
    "a loop that was left": "The story" + " of the story" * 12 + " ends here, at the old lighthouse.",
}


@pytest.mark.parametrize("ids, loop", [
    ([1, 2] + [7] * 28, Loop(2, 1, 27 / 30)),
    ([1, 2] + [7, 8, 9] * 9, Loop(2, 3, 24 / 29)),
    ([1, 2] + [7, 8, 9] * 9 + [5, 0], Loop(2, 3, 24 / 31)),         # a full stop and an end
    ([1] + [*range(20, 60)] * 2 + [*range(20, 30)], Loop(1, 40, 50 / 91)),
    ([1] + [*range(20, 60)] * 2 + [*range(20, 29)], None),          # the third copy has hardly begun
    ([1, 2] + [7] * 24, None), ([7] * 40 + [4, 5, 6], None), ([], None), ([3], None), (list(range(300)), None)])
def test_the_shortest_period_at_the_end_is_found(ids, loop):
    assert find_loop(ids) == loop


def test_periods_beyond_the_longest_are_not_looked_for():
    assert find_loop([*range(LONGEST_PERIOD)] * 3) == Loop(0, LONGEST_PERIOD, 2 / 3)
    assert find_loop([*range(LONGEST_PERIOD + 1)] * 3) is None


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_model())


@pytest.mark.bundled
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_the_model_is_found(tokenizer, name):
    assert find_loop(tokenizer(LOOPS[name])["input_ids"])


@pytest.mark.bundled
@pytest.mark.parametrize("name", OTHERS)
def test_intended_repetition_is_no_loop(tokenizer, name):
    assert find_loop(tokenizer(OTHERS[name])["input_ids"]) is None
