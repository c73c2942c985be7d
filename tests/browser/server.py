"""The app in this process on a free port, and the path of a browser: for tests and screenshots."""

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import app
from cascadeexit.library import Library

CHROMIUM_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update"]


def find_chromium() -> str | None:
    """Path of an installed Chromium; playwright's own download is not used."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def serve(engine, tokenizer):
    """Serve the app around one model; yields its address."""
    return serve_library(Library.of(engine, tokenizer))


@contextmanager
def serve_library(library: Library, **options) -> Iterator[str]:
    """Serve the app around a library; yields its address. The options are those of `app.build_demo`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runner = app.make_runner(library)
    demo = app.build_demo(runner, **options)
    demo.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True,
                **app.launch_options(demo, runner))
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        demo.close(verbose=False)
