"""A server on a free port in a thread of its own, over a tiny random model, and clients of it."""

from __future__ import annotations

import contextlib
import threading
import time

import openai

from hasten.engine import Engine
from hasten.serve.app import Limits, app
from hasten.serve.server import listen, server
from tests.engine.tiny_checkpoints import TOKENIZER, llama

NAME = "tiny"


def engine(folder, **options):
    model = llama(folder, max_position_embeddings=2048)
    return Engine(model, TOKENIZER, **{"num_pages": 400, "max_running": 8, "prompt_cache": True, **options})


@contextlib.contextmanager
def serving(made, limits=None, **options):
    """The address of a server over an engine, which is left open; no call may be left in the end."""
    built = app(made, NAME, limits or Limits(), **options)
    running = server(built, shutdown_s=5)
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            wait(lambda: running.started)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join()
    assert built.state.calls.num_open == built.state.calls.num_waiting == 0
    made.check_integrity()


def client(address, key="unused"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def wait(condition, most_s=20.0):
    end = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.01)
