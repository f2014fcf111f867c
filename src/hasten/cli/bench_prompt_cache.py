"""`hasten bench prompt-cache`: TTFT cold, with a prefix in pages and from disk; the verb is added by `bench.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.bench import records
from hasten.bench.records import Record
from hasten.bench.suites import parse_sizes


def prompt_cache(
    model: Annotated[str | None, typer.Option(help="A folder with a checkpoint; the built-in model if none.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of prompts, such as 512,8000.")] = "256,1024,4096",
    known: Annotated[str, typer.Option(help="How much of them is known, in percent.")] = "50,100",
    repeats: Annotated[int, typer.Option(min=1, help="Prompts that count, after one to warm up.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="On which disk files go; the system's temporary folder.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; by default the GPU where there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Append the records to this file, one JSON line each.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records instead of a table.")] = False,
    commit: Annotated[str | None, typer.Option(help="Commit of the sources, where git is not there to say.")] = None,
) -> None:
    """Time to the first token over prompt length and share of it that is known, and from where on reading pays."""
    from hasten.bench import prompt_cache as suite  # loads transformers, seconds that the other verbs save
    from hasten.cli.bench import find_device, tell  # that module adds this verb, so it cannot be imported first
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
    made: list[Record] = []

    def emit(some: list[Record]) -> None:
        made.extend(some)
        if out is not None:
            records.append(out, some)
        if as_json:
            for record in some:
                print(records.to_line(record), flush=True)

    suite.run(options, emit, tell)
    if not as_json:
        print(suite.table(made))
