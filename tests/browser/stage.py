"""A stage: the scripts and styles of the token view in a page without gradio, with the real handlers behind it.

It loads in a fraction of the time of the app. Tests of how the app is connected use the app itself.
"""

import json

import app
from cascadeexit.library import Library
from cascadeexit.page import Page
from cascadeexit.runner import Runner
from cascadeexit.settings import Settings

# What gradio's theme gives to the token view.
_THEME = """
:root { --body-text-color: #1e293b; --body-background-fill: #fff; --block-background-fill: #fff;
        --border-color-primary: #e2e8f0; --background-fill-secondary: #f8fafc; }
.dark { --body-text-color: #f1f5f9; --body-background-fill: #0f172a; --block-background-fill: #1e293b;
        --border-color-primary: #334155; --background-fill-secondary: #1e293b; }
*, ::before, ::after { box-sizing: border-box; }
body { margin: 0; font: 1rem/1.5 sans-serif; background: var(--body-background-fill); color: var(--body-text-color); }
button { background: none; border: 0; font: inherit; color: inherit; padding: 0; cursor: pointer; }
#ce-bar { height: 140px; }
"""
_PAGE = """<!doctype html><html lang="en"><title>Stage</title><style>{styles}</style>
<body class="{theme}"><div class="gradio-container"><main class="main">
<div id="ce-bar"><label id="ce-prompt">Prompt <textarea></textarea></label></div>
<div id="view"><div class="ce"></div></div></main></div>"""
_START = """(() => {
    const element = document.getElementById('view'), props = { value: '' };
    let changed;
    const watch = (name, then) => { changed = then; };
    const trigger = (name, data) => window['on_' + name](data).then(window.feed);
    const server = { token_card: list => window.token_card(list), layer_map: () => null };
    window.feed = value => { props.value = value; changed(); document.dispatchEvent(new Event('ce-fork-over')); };
    SCRIPT
})()"""


def handlers_of(engine, tokenizer) -> Page:
    return Page(Runner(Library.of(engine, tokenizer)))


def finished_run(handlers: Page, settings: dict) -> str:
    """The stream of a run with these settings."""
    chosen = Settings(model=handlers.library.labels[0], **settings)
    return [frame.stream for frame in handlers.respond(chosen) if frame.stream][-1]


class Stage:
    """A page of the token view around a model.

    Attributes:
        page: playwright's page.
        stream: the value that the view shows.
    """

    def __init__(self, page, handlers: Page, theme: str = "light"):
        self.page, self.stream, self._handlers = page, "", handlers
        page.expose_function("token_card", lambda values: self._handlers.token_card(*values))
        page.expose_function("on_fork", self._fork)
        styles = "\n".join(path.read_text(encoding="utf-8") for path in app.styles())
        # Without an address there is no storage, so each visit would be the first one.
        styles += ".ce-tour { display: none !important; }"
        page.set_content(_PAGE.format(styles=_THEME + styles, theme=theme))
        page.evaluate(_START.replace("SCRIPT", app.page_script()))

    def run(self, **settings) -> None:
        """Run a prompt to its end, and show it."""
        self.show(finished_run(self._handlers, settings))

    def show(self, stream: str) -> None:
        self.stream = stream
        self.page.evaluate("stream => window.feed(stream)", stream)

    def records(self) -> list[dict]:
        return [app.stream.expand(line) for line in self.stream.splitlines()]

    def show_records(self, records: list[dict]) -> None:
        self.show("".join(json.dumps(r) + "\n" for r in records))

    def _fork(self, chosen: dict) -> str:
        frames = self._handlers.fork(*(chosen[name] for name in ("run", "side", "at", "id")))
        return ([frame.stream for frame in frames if frame.stream] or [self.stream])[-1]
