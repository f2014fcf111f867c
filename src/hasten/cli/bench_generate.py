"""`hasten bench generate`: the engine beside transformers' `generate`; the verb is added by `bench.py`."""

from __future__ import annotations

from itertools import product
from typing import Annotated

import typer

from hasten.bench.problems import parse_dtype
from hasten.bench.suites import parse_sizes
from hasten.cli.measuring import AsJson, Collector, Commit, Device, Out, find_device, tell
from hasten.errors import ArgumentError

#: what is measured when nothing is said, by kind of device
DEFAULTS = {
    "cuda": {"shape": "qwen3-0.6b", "batch": "1,8,64,256", "prompt": "512", "new": "128", "dtype": "bf16"},
    "cpu": {"shape": "tiny", "batch": "1,4", "prompt": "32", "new": "16", "dtype": "fp32"},
}


def generate(
    model: Annotated[str | None, typer.Option(help="A folder with a checkpoint of transformers.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="llama-3.1-8b, llama-1b, qwen3-0.6b or tiny: random weights.")
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Prompts at a time, such as 1,8,64.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Tokens of each prompt, such as 512,4096.")] = None,
    new: Annotated[str | None, typer.Option(help="New tokens of each, such as 128.")] = None,
    variants: Annotated[str, typer.Option(help="transformers[-static], hasten[-unmerged, -eager, -compile].")] = "",
    kv_dtype: Annotated[str | None, typer.Option(help="int8 or fp8, of the engine's cache.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs that count, after one to warm up.")] = 3,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; by default bf16 on a GPU.")] = None,
    device: Device = None,
    out: Out = None,
    as_json: AsJson = False,
    commit: Commit = None,
) -> None:
    """Many prompts continued at once: ms a step and tokens/s, ours beside transformers', and the share of bandwidth."""
    from hasten.bench import generation as suite  # loads transformers, seconds that the other verbs save

    place = find_device(device)
    usual = DEFAULTS.get(place.type, DEFAULTS["cpu"])
    if model and shape:
        raise ArgumentError("shape", "nothing beside model", shape, "give one of them")
    if shape and shape not in suite.SHAPES:
        raise ArgumentError("shape", f"one of {', '.join(suite.SHAPES)}", shape, "give a folder as --model instead")
    sizes = product(
        parse_sizes("prompt", prompt or usual["prompt"]),
        parse_sizes("new", new or usual["new"]),
        parse_sizes("batch", batch or usual["batch"]),
    )
    options = suite.Options(
        model=model or shape or usual["shape"],
        sizes=[(count, length, more) for length, more, count in sizes],
        variants=variants.split(",") if variants else suite.USUAL,
        dtype=parse_dtype(dtype or usual["dtype"]),
        device=place,
        kv_dtype=kv_dtype,
        repeats=repeats,
        commit=commit,
    )
    made = Collector(out, as_json)
    suite.run(options, made.emit, tell)
    if not as_json:
        print(suite.table(made.records))
