"""`hasten bench longformer`: a layer or a model against length; the verb is added by `bench.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.bench import longformer as suite
from hasten.bench import records
from hasten.bench.records import Record
from hasten.bench.suites import parse_sizes


def longformer(
    seqlen: Annotated[str, typer.Option(help="Lengths, such as 1024,4096 or 512..65536 (doubling).")] = "1024,4096",
    window: Annotated[int, typer.Option(min=2, help="Both sides together.")] = 512,
    num_global: Annotated[int, typer.Option(min=0, help="Global tokens, from the first on.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Texts.")] = 1,
    layers: Annotated[int, typer.Option(min=0, help="0: one attention layer; else a model of so many layers.")] = 0,
    variants: Annotated[str, typer.Option(help="hasten, huggingface, full.")] = ",".join(suite.VARIANTS),
    repeats: Annotated[int, typer.Option(min=1, help="Steps that count, after one to warm up.")] = 3,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; by default the GPU where there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Append the records to this file, one JSON line each.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records instead of a table.")] = False,
    commit: Annotated[str | None, typer.Option(help="Commit of the sources, where git is not there to say.")] = None,
) -> None:
    """Forward and backward of Longformer attention against length: ours, Hugging Face's, full attention."""
    from hasten.cli.bench import find_device, tell  # that module adds this verb, so it cannot be imported first

    place = find_device(device)
    chosen = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    options = suite.Options(
        problems=[
            suite.Problem(seqlen=length, window=window, num_global=num_global, batch=batch, layers=layers, dtype=chosen)
            for length in parse_sizes("seqlen", seqlen)
        ],
        variants=tuple(variants.split(",")),
        device=str(place),
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
