"""`hasten bench decode`: decode attention over a KV cache, beside PyTorch's own; the verb is added by `bench.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from hasten.bench import decode as suite
from hasten.bench import records
from hasten.bench.records import Record

#: what is measured when nothing is said, by kind of device: the table of the docs on a GPU, seconds of work on a CPU
DEFAULTS = {"cuda": ("1,16,128", "1024,8192,65536"), "cpu": ("1,4", "256,1024")}


def decode(
    heads: Annotated[str, typer.Option(help="mha, gqa, mqa: 32 query heads on 32, 8, 1.")] = "mha,gqa,mqa",
    batch: Annotated[str | None, typer.Option(help="Sequences, such as 1,16,128.")] = None,
    context: Annotated[str | None, typer.Option(help="Tokens of each in the cache, behind a shared prefix.")] = None,
    shared: Annotated[int, typer.Option(min=0, help="Tokens that all sequences have in common, whole pages.")] = 0,
    head_dim: Annotated[int, typer.Option(min=1, help="Size of a head.")] = 128,
    peers: Annotated[str, typer.Option(help="sdpa_cudnn, sdpa_flash, sdpa_efficient, sdpa_math; none for none.")] = "",
    plan: Annotated[list[str] | None, typer.Option(help="Also ours as UNITS,BLOCK_N,WARPS,STAGES; repeatable.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; by default the GPU where there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Append the records to this file, one JSON line each.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records instead of a table.")] = False,
    commit: Annotated[str | None, typer.Option(help="Commit of the sources, where git is not there to say.")] = None,
) -> None:
    """One token a sequence over a KV cache: ours beside PyTorch's own, as a share of the read bandwidth."""
    from hasten.cli.bench import find_device, tell  # that module adds this verb, so it cannot be imported first

    place = find_device(device)
    usual = DEFAULTS.get(place.type, DEFAULTS["cpu"])
    known = "sdpa_cudnn,sdpa_flash" if place.type == "cuda" else "sdpa_flash"
    names = [name for name in (peers or known).split(",") if name != "none"]
    options = suite.Options(
        problems=suite.grid(heads, batch or usual[0], context or usual[1], head_dim, shared, dtype=_dtype(place)),
        device=place,
        peers=names,
        plans=plan or [],
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
        print(suite.table(made), file=sys.stdout)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
