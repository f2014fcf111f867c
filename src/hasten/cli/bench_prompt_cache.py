"""`hasten bench prompt-cache`: TTFT cold, with a prefix in pages and from disk; the verb is added by `bench.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.bench.suites import parse_sizes
from hasten.cli.measuring import AsJson, Collector, Commit, Device, Out, find_device, tell


def prompt_cache(
    model: Annotated[str | None, typer.Option(help="A folder with a checkpoint; the built-in model if none.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of prompts, such as 512,8000.")] = "256,1024,4096",
    known: Annotated[str, typer.Option(help="How much of them is known, in percent.")] = "50,100",
    repeats: Annotated[int, typer.Option(min=1, help="Prompts that count, after one to warm up.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="On which disk files go; the system's temporary folder.")] = None,
    device: Device = None,
    out: Out = None,
    as_json: AsJson = False,
    commit: Commit = None,
) -> None:
    """Time to the first token over prompt length and share of it that is known, and from where on reading pays."""
    from hasten.bench import prompt_cache as suite  # loads transformers, seconds that the other verbs save
    from hasten.models import builtin

    options = suite.Options(
        model=str(builtin.path() if model is None else model),
        lengths=parse_sizes("lengths", lengths),
        shares=[one / 100 for one in parse_sizes("known", known)],
        device=find_device(device),
        folder=None if folder is None else str(folder),
        repeats=repeats,
        commit=commit,
    )
    made = Collector(out, as_json)
    suite.run(options, made.emit, tell)
    if not as_json:
        print(suite.table(made.records))
