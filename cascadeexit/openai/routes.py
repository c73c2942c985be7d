"""Routes: the web side of `Service`. Reads bodies, checks the key, streams answers, and sees when clients leave."""

import hmac
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator

from anyio import CancelScope
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as WebRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cascadeexit.hub import ModelUnavailable
from cascadeexit.openai.answers import Answer
from cascadeexit.openai.errors import ApiError
from cascadeexit.openai.requests import ChatRequest, CompletionRequest, Request
from cascadeexit.openai.service import Moment, Service
from cascadeexit.openai.writing import Job, Written
from cascadeexit.prompts import MAX_BYTES
from cascadeexit.runner import RunFailed, Runner
from cascadeexit.values import shown

log = logging.getLogger("cascadeexit.openai")
COMMENT_SECONDS = 10        # a stream without news sends a comment this often, so that no proxy closes it
CLIENT_LEFT = 499           # status of an answer that nobody reads

Visit = Callable[[WebRequest], None]


def application(runner: Runner, visit: Visit = lambda request: None) -> Starlette:
    """Make the web application to mount at /v1. Its routes are models, chat/completions and completions.

    If the environment variable CASCADEEXIT_API_KEY is set, every request must send this key as its bearer token.

    visit: function that is called with each web request before it is answered. Context variables that it sets also hold
        while the model runs.
    """
    service, key = Service(runner), os.environ.get("CASCADEEXIT_API_KEY", "")

    def entering(request: WebRequest) -> None:
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        if key and not (scheme.lower() == "bearer" and hmac.compare_digest(sent.strip().encode(), key.encode())):
            raise ApiError("expected the key of this server as bearer token, got another one or none", 401,
                           code="invalid_api_key")
        visit(request)

    async def models(request: WebRequest) -> Response:
        entering(request)
        return JSONResponse(service.models())

    async def model(request: WebRequest) -> Response:
        entering(request)
        return JSONResponse(service.model(request.path_params["name"]))

    def answering(kind: type[Request]) -> Callable:
        async def answer(request: WebRequest) -> Response:
            entering(request)
            return await _answer(request, service.answer(kind, await _body(request)))
        return answer

    return Starlette(
        routes=[Route("/models", models), Route("/models/{name:path}", model),
                Route("/chat/completions", answering(ChatRequest), methods=["POST"]),
                Route("/completions", answering(CompletionRequest), methods=["POST"])],
        exception_handlers={ApiError: lambda request, error: _refusal(error),
                            HTTPException: lambda request, error: _refusal(_no_route(request, error))})


async def _body(request: WebRequest) -> bytes:
    """Read the body of a request. Raises ApiError for a body that is too long."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BYTES:
            raise ApiError(f"expected a body of at most {MAX_BYTES:,} bytes, got more", 413)
    return body


async def _answer(request: WebRequest, moments: Iterator[Moment]) -> Response:
    """Answer a request: with one JSON object, or with a stream of server-sent events.

    moments: what `Service.answer` yields for this request.
    """
    steps = _steps(request, moments)
    try:
        async for answer in steps:
            if answer is not None:
                break
        else:
            return Response(status_code=CLIENT_LEFT)
        if answer.request.stream:
            return StreamingResponse(_stream(answer, steps), media_type="text/event-stream",
                                     headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        texts = [news async for _, news in steps if isinstance(news, Written)]
        return JSONResponse(answer.whole(texts))
    except Exception as error:
        return _refusal(_failure(error))


async def _steps(request: WebRequest, moments: Iterator[Moment]) -> AsyncIterator[Moment]:
    """Yield the items of `moments`, each computed in a thread. If the client leaves, end the run at once."""
    try:
        while not await request.is_disconnected():
            moment = await run_in_threadpool(next, moments, moments)
            if moment is moments:           # no more
                return
            yield moment
    finally:
        with CancelScope(shield=True):
            await run_in_threadpool(moments.close)


async def _stream(answer: Answer, steps: AsyncIterator[Moment]) -> AsyncIterator[str]:
    """Yield an answer as server-sent events. An error in the middle becomes an event, too."""
    texts, sent = [], time.monotonic()
    try:
        async for moment in steps:
            chunk = _chunk(answer, *moment)
            if isinstance(moment[1], Written):
                texts.append(moment[1])
            if chunk:
                yield _event(chunk)
                sent = time.monotonic()
            elif time.monotonic() - sent > COMMENT_SECONDS:
                yield ": waiting\n\n"
                sent = time.monotonic()
        if answer.request.stream_options.include_usage:
            yield _event(answer.totals(texts))
    except Exception as error:
        yield _event(_failure(error).body)
    yield "data: [DONE]\n\n"


def _chunk(answer: Answer, i: int, news: Job | str | Written) -> dict | None:
    """Return the chunk of the stream for one item (i, news) of `Service.answer`; None for an empty piece of text."""
    if isinstance(news, Job):
        return answer.opening(i, news.echo or "")
    if isinstance(news, Written):
        return answer.ending(i, news)
    return answer.piece(i, news) if news else None


def _event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _failure(error: Exception) -> ApiError:
    """Convert any error of a run to the ApiError that the client gets."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (RunFailed, ModelUnavailable)):
        log.warning("a request was not answered: %s", error)
        return ApiError(str(error), 503, kind="server_error")
    log.error("a request failed", exc_info=error)
    return ApiError("something went wrong while the model was running; the server's log has the details", 500,
                    kind="server_error")


def _no_route(request: WebRequest, error: HTTPException) -> ApiError:
    return ApiError(f"expected an address and a method that this server offers, got "
                    f"{shown(f'{request.method} {request.url.path}')}", error.status_code)


def _refusal(error: ApiError) -> JSONResponse:
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
    return JSONResponse(error.body, error.status, headers)
