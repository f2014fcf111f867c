"""`hasten serve`: a model over HTTP, as OpenAI's clients ask for it. All work is in `hasten.serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hasten.cli.loading import load
from hasten.errors import MissingExtraError


def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A local Hugging Face checkpoint; the built-in model if none."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is reached from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="How requests name the model; its folder's name if none.")] = None,
    num_pages: Annotated[int | None, typer.Option(help="Pages of the KV cache; by memory if none.")] = None,
    max_running: Annotated[int | None, typer.Option(help="Sequences computed at once; more wait.")] = None,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait for a first token; more get 429.")] = 256,
    max_request_bytes: Annotated[int, typer.Option(help="The longest body of a request.")] = 4 * 2**20,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys, one a line, of which requests must send one; each has its own cache.")
    ] = None,
    metrics_key_file: Annotated[
        Path | None, typer.Option(help="Keys for /metrics; without, it is there only if there are no API keys.")
    ] = None,
    shutdown_s: Annotated[float, typer.Option(help="At the end, requests have so long to finish.")] = 30.0,
    no_prompt_cache: Annotated[
        bool, typer.Option("--no-prompt-cache", help="Compute every prompt whole, to see what the cache saves.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pytorch_model.bin, which can run code.")
    ] = False,
) -> None:
    """Serve a model, the built-in one when none is named, until interrupted."""
    console = Console(stderr=True, highlight=False)
    with console.status("starting PyTorch and transformers") as status:
        from hasten import engine  # takes seconds: here, under the status, and not for --help

        try:
            from hasten.serve import app, keys, server
        except ImportError as error:
            raise MissingExtraError("serve", "hasten serve") from error

        limits = app.Limits(max_waiting=max_waiting, body_bytes=max_request_bytes)
        known, operators = (None if one is None else keys.Keys.read(one) for one in (api_key_file, metrics_key_file))
        loaded = load(model, device, dtype, allow_pickle, status.update)
        status.update("making the KV cache")
        made = engine.Engine(
            loaded.model,
            loaded.tokenizer,
            num_pages=num_pages,
            max_running=max_running,
            prompt_cache=None if no_prompt_cache else True,
        )
    with made:
        called = name or loaded.path.resolve().name
        running = server.server(app.app(made, called, limits, known, operators), shutdown_s=shutdown_s)
        with server.listen(host, port) as listening:
            place = f"http://{host}:{listening.getsockname()[1]}/v1"
            console.print(f"serving {called} at {place}", markup=False, soft_wrap=True)
            running.run(sockets=[listening])


__all__ = ["serve"]
