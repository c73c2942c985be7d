"""Uploads: limits how much a request and all uploads together may send, so that no visitor fills memory or disk.

Gradio limits each file of a request, but neither the whole request nor the sum of all uploads. `UploadLimits` stands
before Gradio as an ASGI middleware.
"""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LEAST_BYTES = 50_000        # what an upload counts at least, since many tiny files also fill a disk


class UploadLimits:
    """ASGI middleware that refuses requests which are too long, and uploads once there are too many.

    Args:
        app: the application behind it.
        request_bytes: largest body of one request.
        total_bytes: largest sum of all uploads within the last `keep_seconds` seconds.
        keep_seconds: how long uploads are kept. The application deletes complete ones itself.
        folder: where uploads are written, each in a folder of its own. Files beside these folders are what broken
            uploads left. They and empty folders are deleted when they are older than `keep_seconds`.
        clock: function that returns the time in seconds.
    """

    def __init__(self, app: ASGIApp, request_bytes: int, total_bytes: int, keep_seconds: float, folder: Path,
                 clock: Callable[[], float] = time.time):
        self._app, self._request_bytes, self._total_bytes = app, request_bytes, total_bytes
        self._keep_seconds, self._folder, self._clock = keep_seconds, folder, clock
        self._uploads: deque[tuple[float, int]] = deque()       # (time, bytes) of each upload that was let through
        self._kept_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        try:
            self._check(scope["path"], int(length) if length.isdecimal() else None)
        except HTTPException as refused:
            await PlainTextResponse(refused.detail, refused.status_code)(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _check(self, path: str, length: int | None) -> None:
        """Raise HTTPException for a request that is refused before its body is read.

        length: bytes of the body as the request states them; None if it does not.
        """
        if length is not None and length > self._request_bytes:
            raise self._too_long()
        if not path.rstrip("/").endswith("/upload"):
            return
        if length is None:
            raise HTTPException(411, "expected an upload that states its length, got one without")
        self._forget_old()
        if self._kept_bytes + max(length, LEAST_BYTES) > self._total_bytes:
            raise HTTPException(503, "there were too many uploads lately: try again later")
        self._uploads.append((self._clock(), max(length, LEAST_BYTES)))
        self._kept_bytes += max(length, LEAST_BYTES)

    def _forget_old(self) -> None:
        """Stop counting uploads that the application has deleted, and delete what broken uploads left."""
        oldest = self._clock() - self._keep_seconds
        while self._uploads and self._uploads[0][0] < oldest:
            self._kept_bytes -= self._uploads.popleft()[1]
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            try:
                if path.stat().st_mtime < oldest:
                    path.rmdir() if path.is_dir() else path.unlink()
            except OSError:             # a folder that is not empty, or another process was faster
                continue

    def _counted(self, receive: Receive) -> Receive:
        """Wrap `receive`: it raises HTTPException when a body becomes too long whose length was not stated."""
        read = 0

        async def counting() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._request_bytes:
                raise self._too_long()
            return message
        return counting

    def _too_long(self) -> HTTPException:
        return HTTPException(413, f"expected a request of at most {self._request_bytes:,} bytes, got a longer one")
