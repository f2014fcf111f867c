"""`hasten generate`: text from a model as it comes, then what it took.

The text goes to stdout; progress and figures go to stderr. All work is in `hasten.engine`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hasten import config
from hasten.cli.loading import load

if TYPE_CHECKING:
    from hasten.engine import Checkpoint, Finished, Token

MIB = 2**20


def generate(
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads it from stdin.")],
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A local Hugging Face checkpoint; the built-in model if none."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="At most this many new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the fewest tokens with this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Draw among tokens this likely beside the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    stop_id: Annotated[list[int] | None, typer.Option(help="End at this token id; may be given again.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn, by the chat template.")] = False,
    no_kv_cache: Annotated[
        bool, typer.Option("--no-kv-cache", help="Compute all tokens again at every step, to see what the cache saves.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pytorch_model.bin, which can run code.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text and figures.")] = False,
) -> None:
    """Stream text from a model, the built-in one when none is named, then its figures."""
    console = Console(stderr=True, highlight=False)
    with console.status("starting PyTorch and transformers") as status:
        from hasten import engine  # takes seconds: here, under the status, and not for --help

        sampling = engine.Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=tuple(stop or ()),
            stop_ids=tuple(stop_id or ()),
        )
        text = sys.stdin.read() if prompt == "-" else prompt
        checkpoint = load(model, device, dtype, allow_pickle, status.update)
        threads = engine.step_threads(checkpoint.model) if config.num_threads() is None else None
        runner = engine.Runner(checkpoint.model, use_cache=not no_kv_cache, may_lay_out=True, step_threads=threads)
        status.update("recording the decode step")
        runner.warm_up()
    events = engine.generate(runner, checkpoint.tokenizer, text, sampling, is_chat=chat)
    finished = _show(events, is_quiet=as_json)
    if as_json:
        print(json.dumps({"model": str(checkpoint.path), **asdict(finished)}))
        return
    for line in figures(finished, checkpoint):
        console.print(line, style="dim", soft_wrap=True, markup=False)


def _show(events: Iterator[Token | Finished], *, is_quiet: bool) -> Finished:
    """Write the text as it comes; returns the record at the end."""
    last: Any = None
    for last in events:
        if not is_quiet and hasattr(last, "id") and last.text:
            sys.stdout.write(last.text)
            sys.stdout.flush()
    finished: Finished = last
    if not is_quiet and not finished.text.endswith("\n"):
        print(flush=True)
    return finished


def figures(finished: Finished, checkpoint: Checkpoint) -> list[str]:
    """What generation took, in two or three lines."""
    count = len(finished.token_ids)
    speed = "—"
    if finished.tokens_per_s is not None:
        speed = f"{finished.tokens_per_s:,.1f} tokens/s ({1e3 / finished.tokens_per_s:,.2f} ms a token)"
    end = "length" if finished.stopped_by is None else f"stop {finished.stopped_by!r}"
    lines = [
        f"TTFT {finished.ttft_s * 1e3:,.0f} ms · {speed} · {finished.prompt_tokens} tokens in, {count} out · {end}",
        _cache_line(finished, checkpoint.model.config),
        f"{finished.dtype} on {finished.device} · attention: {checkpoint.attention} · decoding: {finished.path}",
    ]
    return lines


def _cache_line(finished: Finished, settings: Any) -> str:
    per_token, count = finished.cache_bytes_per_token, len(finished.token_ids)
    used = finished.prompt_tokens + count - 1  # the last token goes through no layer
    if finished.cache_bytes:
        line = f"KV cache {finished.cache_bytes / MIB:,.2f} MiB for {finished.cache_capacity:,} tokens"
    else:
        ratio = finished.num_positions / used
        line = (
            f"no KV cache: {finished.num_positions:,} tokens went through the model, {ratio:,.1f} times the {used:,} "
            f"that would have with one of {per_token * used / MIB:,.2f} MiB"
        )
    context = getattr(settings.get_text_config(decoder=True), "max_position_embeddings", None)
    full = f"; {per_token * context / MIB:,.1f} MiB at its context of {context:,}" if isinstance(context, int) else ""
    return f"{line} ({per_token / 1024:,.1f} KiB a token{full})"


__all__ = ["figures", "generate"]
