"""What a client is told when a request cannot be served, in the shape of OpenAI's errors.

Raised while a body is read and while it is answered; app.py turns it into a response. Knows no route.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from hasten.errors import ArgumentError, ArgumentTypeError, HastenError, MissingExtraError

_KINDS = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}

# names of the engine's arguments -> those of the protocol's fields
_FIELDS = {"json_schema": "response_format", "chat": "messages", "num_pages": "max_tokens"}


class Refusal(HastenError):
    """A request that is answered with an error. status: of HTTP. param: the field at fault. code: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status, self.message, self.param, self.code = status, " ".join(message.split()), param, code
        self.headers = dict(headers or {})
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        """The error as JSON: {"error": {"message", "type", "param", "code"}}."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The same as a response."""
        return JSONResponse(self.body(), self.status, self.headers)


def bad_field(name: str, expected: str, got: object, hint: str) -> Refusal:
    """A field whose value cannot be honoured: 400 with its name."""
    return Refusal(400, f"{name}: expected {expected}, got {str(got)[:100]}; {hint}", param=name, code="invalid_value")


def refusal_of(error: HastenError) -> Refusal:
    """What a client is told about an error of the engine: 400 for what it asked, 500 for what went wrong here."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ArgumentError | ArgumentTypeError):
        name = _FIELDS.get(error.argument, error.argument)
        if name == "engine":
            return shutting_down()
        return Refusal(400, str(error), param=name, code="invalid_value")
    if isinstance(error, MissingExtraError) and error.extra == "structured":
        return Refusal(400, str(error), param="response_format", code="unsupported")
    return Refusal(500, str(error), code="engine_error")


def shutting_down() -> Refusal:
    """The server is going: 503."""
    return Refusal(503, "the server is shutting down; try again", code="shutting_down", headers={"Retry-After": "1"})


__all__ = ["Refusal", "bad_field", "refusal_of", "shutting_down"]
