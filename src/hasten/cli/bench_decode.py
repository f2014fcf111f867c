"""`hasten bench decode`: decode attention over a KV cache, beside PyTorch's own; the verb is added by `bench.py`."""

from __future__ import annotations

import sys
from typing import Annotated

import torch
import typer

from hasten.bench import decode as suite
from hasten.cli.measuring import AsJson, Collector, Commit, Device, Out, find_device, tell

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
    device: Device = None,
    out: Out = None,
    as_json: AsJson = False,
    commit: Commit = None,
) -> None:
    """One token a sequence over a KV cache: ours beside PyTorch's own, as a share of the read bandwidth."""
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
    made = Collector(out, as_json)
    suite.run(options, made.emit, tell)
    if not as_json:
        print(suite.table(made.records), file=sys.stdout)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
