"""Running the app: a socket, an end that lets requests finish. Called by the command line and by tests."""

from __future__ import annotations

import math
import socket

import uvicorn
from starlette.applications import Starlette

from hasten.errors import ArgumentError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises ArgumentError for an address that cannot be had."""
    if not 0 <= port < 65536:
        raise ArgumentError("port", "0 to 65535", port, "0 takes a free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ArgumentError("port", f"a free one of this machine at {host}", port, str(error)) from error


def server(app: Starlette, *, shutdown_s: float = 30.0) -> uvicorn.Server:
    """A server, to `run(sockets=[listen(...)])` until SIGINT or SIGTERM.

    It then takes no new connections, and ends once requests have, or cancels them after shutdown_s. Access is not
    logged.
    """
    if not (shutdown_s > 0 and math.isfinite(shutdown_s)):
        raise ArgumentError("shutdown_s", "more than 0 seconds", shutdown_s, "choose a larger one")
    config = uvicorn.Config(
        app,
        timeout_graceful_shutdown=math.ceil(shutdown_s),
        access_log=False,
        log_level="warning",
        server_header=False,
        lifespan="off",
        ws="none",
    )
    return uvicorn.Server(config)


__all__ = ["listen", "server"]
