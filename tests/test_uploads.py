"""Limits of requests and uploads, before gradio reads them."""

import asyncio
import os

import pytest

from cascadeexit.uploads import LEAST_BYTES, UploadLimits


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def limits(tmp_path, clock):
    """Limits in front of an application that reads the whole body and answers 200."""
    async def application(scope, receive, send):
        more = True
        while more:
            message = await receive()
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    return UploadLimits(application, 1_000_000, 3_000_000, 60.0, tmp_path, clock)


def ask(limits, length: int | None, path: str = "/gradio_api/upload", parts: int = 1) -> int:
    """Send a request of this stated length, with an empty body; returns the status of the answer."""
    headers = [] if length is None else [(b"content-length", str(length).encode())]
    sent = [{"type": "http.request", "body": b"x" * 400_000, "more_body": i < parts - 1} for i in range(parts)]
    found = []

    async def receive():
        return sent.pop(0)

    async def send(message):
        found.append(message)
    asyncio.run(limits(dict(type="http", path=path, headers=headers), receive, send))
    return found[0]["status"]


def test_a_request_that_is_too_long_is_refused_wherever_it_goes(limits):
    assert ask(limits, 1_000_000) == 200
    for path in ("/gradio_api/upload", "/gradio_api/queue/join"):
        assert ask(limits, 1_000_001, path) == 413


def test_a_body_of_unknown_length_is_counted(limits):
    assert ask(limits, None, "/gradio_api/queue/join", parts=2) == 200
    with pytest.raises(Exception, match="at most 1,000,000 bytes"):         # the framework answers it with 413
        ask(limits, None, "/gradio_api/queue/join", parts=3)
    assert ask(limits, None) == 411


def test_all_uploads_together_are_limited_until_the_old_ones_are_deleted(limits, clock):
    assert [ask(limits, 1_000_000) for _ in range(4)] == [200, 200, 200, 503]
    assert ask(limits, 1_000_000, "/gradio_api/queue/join") == 200
    clock.now += 61
    assert ask(limits, 1_000_000) == 200


def test_many_tiny_uploads_are_limited_too(limits):
    assert [ask(limits, 1, "/upload/") for _ in range(61)] == [200] * (3_000_000 // LEAST_BYTES) + [503]


def test_what_broken_uploads_left_is_deleted_when_it_is_old(limits, clock, tmp_path):
    for name in ("old", "new"):
        (tmp_path / f"tmp-{name}").write_bytes(b"x")
        (tmp_path / f"folder-{name}").mkdir()
    (tmp_path / "folder-kept").mkdir()
    (tmp_path / "folder-kept" / "file").write_bytes(b"x")
    for path in tmp_path.iterdir():
        os.utime(path, (clock.now - (10 if "new" in path.name else 61),) * 2)
    ask(limits, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"tmp-new", "folder-new", "folder-kept"}
