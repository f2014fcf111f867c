"""The ASGI app: which paths there are, who may ask, how much, and what becomes of who leaves.

Built over an engine by `app`, run by server.py or in a process of one's own. Protocols are in files of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hasten.engine import Engine, Finished, Token
from hasten.errors import ArgumentError, ArgumentTypeError, HastenError
from hasten.serve import fields
from hasten.serve.calls import Calls
from hasten.serve.chat import Chat
from hasten.serve.completions import Completion
from hasten.serve.keys import Keys
from hasten.serve.metrics import FORMAT, Metrics
from hasten.serve.refusals import Refusal, refusal_of

Answered = TypeVar("Answered")
Events = AsyncIterator[tuple[int, Token | Finished]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """max_waiting: calls that wait for their first token; more get 429. body_bytes, body_s: size of a request, and how
    long it may take to come."""

    max_waiting: int = 256
    body_bytes: int = 4 * 2**20
    body_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_waiting", "body_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ArgumentTypeError(name, "an int >= 1", repr(value), "write a whole number")
            if value < 1:
                raise ArgumentError(name, "an int >= 1", value, "choose a larger one")
        if not self.body_s > 0:
            raise ArgumentError("body_s", "more than 0 seconds", self.body_s, "choose a larger one")


def app(
    engine: Engine,
    model_name: str,
    limits: Limits | None = None,
    keys: Keys | None = None,
    metrics_keys: Keys | None = None,
) -> Starlette:
    """The app of an engine that has a tokenizer. model_name: by which requests name the model.

    keys: one of which must be sent with every path of /v1; each is a tenant of the prompt cache.
    metrics_keys: of the operator, for /metrics, whose figures no tenant may see: without them it is there only where
    there are no keys.

    The engine is the caller's to close, after the app's last request.
    """
    if engine.tokenizer is None:
        raise ArgumentError("engine", "one with a tokenizer", "one without", "pass tokenizer= to Engine")
    server = _Server(engine, model_name, limits or Limits(), keys or Keys(), metrics_keys or Keys())
    routes = [
        Route("/health", server.health, methods=["GET"]),
        Route("/v1/models", server.models, methods=["GET"]),
        Route("/v1/models/{name:path}", server.model, methods=["GET"]),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
    ]
    if metrics_keys is not None or keys is None:
        routes.append(Route("/metrics", server.metrics, methods=["GET"]))
    handlers: Any = {Refusal: _refused, HTTPException: _not_found, Exception: _broken}
    made = Starlette(routes=routes, exception_handlers=handlers)
    made.add_middleware(_Counted, metrics=server.calls.metrics)
    made.state.calls = server.calls
    return made


class _Server:
    """What the routes share."""

    def __init__(self, engine: Engine, model_name: str, limits: Limits, keys: Keys, metrics_keys: Keys) -> None:
        self._engine, self._limits, self._keys, self._metrics_keys = engine, limits, keys, metrics_keys
        self.calls = Calls(engine, limits.max_waiting)
        self._model = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "hasten"}

    async def health(self, request: Request) -> Response:
        stats = self._engine.stats()
        return JSONResponse({"status": "ok", "num_running": stats.num_running, "num_waiting": self.calls.num_waiting})

    async def metrics(self, request: Request) -> Response:
        self._metrics_keys.salt(request.headers.get("authorization"))
        return Response(self.calls.metrics.text(), headers={"Content-Type": FORMAT})

    async def models(self, request: Request) -> Response:
        self._salt(request)
        return JSONResponse({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        self._salt(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, Completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, Chat)

    def _salt(self, request: Request) -> str:
        return self._keys.salt(request.headers.get("authorization"))

    async def _answer(self, request: Request, protocol: type[Completion] | type[Chat]) -> Response:
        """Run a request; a stream begins once its prompts are accepted, so that refusals have a status."""
        salt, body = self._salt(request), await self._body(request)
        try:
            asked: Completion | Chat = await asyncio.to_thread(protocol, body, self._engine.tokenizer)
        except Refusal:
            raise
        except HastenError as error:
            raise refusal_of(error) from error
        self._check_model(asked.model)
        stack = contextlib.AsyncExitStack()
        try:
            opening = self.calls.open(asked.prompts, asked.sampling, salt)
            call = await _unless_gone(request.receive, stack.enter_async_context(opening))
            if asked.is_stream:
                return _Stream(asked, call.events(), stack.pop_all())
            return JSONResponse(asked.answer(await _unless_gone(request.receive, _all(call.events()))))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        finally:
            await stack.aclose()

    def _check_model(self, name: Any) -> None:
        if name is None:
            message = f"model: expected {self._model['id']!r}, got none; name it"
            raise Refusal(400, message, param="model", code="missing_field")
        if name != self._model["id"]:
            message = f"model: expected {self._model['id']!r}, got {str(name)[:100]!r}; see GET /v1/models"
            raise Refusal(404, message, param="model", code="model_not_found")

    async def _body(self, request: Request) -> dict[str, Any]:
        """The fields of a body that is not too long and does not take too long to come."""
        most, data = self._limits.body_bytes, bytearray()
        message = f"the body: expected at most {most} bytes, got more; send less"
        length = request.headers.get("content-length", "0")
        try:
            async with asyncio.timeout(self._limits.body_s):
                if length.isdigit() and int(length[:20]) > most:
                    raise Refusal(413, message, code="too_large")
                async for piece in request.stream():
                    data += piece
                    if len(data) > most:
                        raise Refusal(413, message, code="too_large")
        except TimeoutError as error:
            raise Refusal(408, f"the body did not come within {self._limits.body_s:g} s; send it faster") from error
        return fields.read_body(bytes(data))


class _Counted:
    """Counts the responses of the protocols by their status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"].startswith("/v1/"):
                self._metrics.responded(message["status"])
            await send(message)

        await self._app(scope, receive, counted)


class _Stream(Response):
    """Chunks as server-sent events; who leaves ends it, and so the call behind it."""

    def __init__(self, asked: Completion | Chat, events: Events, stack: contextlib.AsyncExitStack) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._asked, self._events, self._stack = asked, events, stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            with contextlib.suppress(ClientDisconnect, OSError):
                await _unless_gone(receive, self._send_all(send))
                await send({"type": "http.response.body", "body": b""})

    async def _send_all(self, send: Send) -> None:
        async def tell(data: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        try:
            async for number, event in self._events:
                for chunk in self._asked.chunks(number, event):
                    await tell(json.dumps(chunk))
        except Refusal as refusal:  # the status is sent: the error is the last event
            await tell(json.dumps(refusal.body()))
            return
        for chunk in self._asked.last_chunks():
            await tell(json.dumps(chunk))
        await tell("[DONE]")


async def _all(events: Events) -> list[tuple[int, Token | Finished]]:
    return [one async for one in events if isinstance(one[1], Finished)]


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, Answered]) -> Answered:
    """What some work gives; it is cancelled if the client leaves, and ClientDisconnect raised."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal), "a handler of refusals"
    return error.response()


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "a handler of what routing raises"
    message = f"{request.method} {request.url.path[:100]}: {error.detail}; see docs/design/serve.md for what there is"
    return Refusal(error.status_code, message, code="not_found", headers=error.headers).response()


async def _broken(request: Request, error: Exception) -> Response:
    return Refusal(500, "something went wrong in the server; its log has the traceback", code="internal").response()


__all__ = ["Limits", "app"]
