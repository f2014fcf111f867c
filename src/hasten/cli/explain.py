"""`hasten explain`: what one attention gets on this machine and why, with its FLOPs, bytes and least time."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from hasten.bench.problems import Pattern, Problem, parse_dtype
from hasten.cli.measuring import Device, find_device
from hasten.ops.explain import explain as explain_attention


def explain(
    batch: Annotated[int, typer.Option(min=1)] = 1,
    seqlen: Annotated[int, typer.Option(min=1)] = 4096,
    heads: Annotated[int, typer.Option(min=1)] = 16,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="As many as heads by default.")] = None,
    head_dim: Annotated[int, typer.Option(min=1)] = 128,
    mask: Annotated[
        str,
        typer.Option(
            help="causal, full, window:LEFT,RIGHT, longformer:WINDOW,GLOBAL, blocks:PERCENT or documents:MEAN."
        ),
    ] = "causal",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    device: Device = None,
    implementation: Annotated[str | None, typer.Option(help="Force one, to hear why it cannot.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Say which implementation a call gets here and why, with its FLOPs, bytes and roofline time."""
    problem = Problem(
        batch=batch,
        seqlen=seqlen,
        num_heads=heads,
        num_kv_heads=kv_heads or heads,
        head_dim=head_dim,
        pattern=Pattern.parse(mask),
        dtype=parse_dtype(dtype),
    )
    q, k, v = problem.empty_tensors(find_device(device))
    told = explain_attention(q, k, v, problem.mask(q.device), implementation=implementation)
    print(json.dumps(asdict(told)) if as_json else told)
