"""The browser reads the lines of a stream as Python does."""

import pytest

from app import ASSETS
from cascadeexit.wire import expand, write_line
from tests.helpers import run_stream
from tests.test_wire import TOKEN
from tests.tiny_models import tiny_engine
from tests.tiny_text import HOSTILE, tiny_tokenizer

pytestmark = pytest.mark.browser
# Of dom.js, which needs a page, only the one function that wire.js calls.
CODE = (ASSETS / "page" / "wire.js").read_text(encoding="utf-8") + "const missing = x => x === null || x === undefined;"
EXPAND = """([code, lines]) =>
    new Function('lines', code + '; return lines.map(line => expand(JSON.parse(line)))')(lines)"""


@pytest.mark.parametrize("mode", ["cascade", "verified"])
def test_the_browser_expands_lines_as_python_does(chromium, mode):
    lines = run_stream(tiny_engine(seed=3), tiny_tokenizer(), mode).text.splitlines()
    lines += [write_line("token", **TOKEN | change).strip() for change in (
        dict(ran=[[0, 1, 1], [1, 4, 7]], read=0.5, ms=0.0), dict(side="fork2"), dict(side="second", conf=[None] * 3),
        dict(special=True), dict(bytes="f0", part=True), *(dict(text=text) for text in HOSTILE))]
    page = chromium.new_page()
    found = page.evaluate(EXPAND, [CODE, lines])
    page.close()
    assert found == [expand(line) for line in lines]
