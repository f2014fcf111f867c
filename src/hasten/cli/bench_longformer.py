"""`hasten bench longformer`: a layer or a model against length; the verb is added by `bench.py`."""

from __future__ import annotations

from typing import Annotated

import typer

from hasten.bench import longformer as suite
from hasten.bench.suites import parse_sizes
from hasten.cli.measuring import AsJson, Collector, Commit, Device, Out, find_device, tell


def longformer(
    seqlen: Annotated[str, typer.Option(help="Lengths, such as 1024,4096 or 512..65536 (doubling).")] = "1024,4096",
    window: Annotated[int, typer.Option(min=2, help="Both sides together.")] = 512,
    num_global: Annotated[int, typer.Option(min=0, help="Global tokens, from the first on.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Texts.")] = 1,
    layers: Annotated[int, typer.Option(min=0, help="0: one attention layer; else a model of so many layers.")] = 0,
    variants: Annotated[str, typer.Option(help="hasten, huggingface, full.")] = ",".join(suite.VARIANTS),
    repeats: Annotated[int, typer.Option(min=1, help="Steps that count, after one to warm up.")] = 3,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Device = None,
    out: Out = None,
    as_json: AsJson = False,
    commit: Commit = None,
) -> None:
    """Forward and backward of Longformer attention against length: ours, Hugging Face's, full attention."""
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
    made = Collector(out, as_json)
    suite.run(options, made.emit, tell)
    if not as_json:
        print(suite.table(made.records))
