"""`hasten uptrain`: a converted checkpoint trained on a little, and what that won back.

With --kv-heads it converts first, below the run folder. What happens goes to stderr, the report to stdout.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli import train as options
from hasten.cli.train_progress import Display, summary

if TYPE_CHECKING:
    from hasten.train.uptrain import Uptrained


def uptrain(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A converted one; any one with --kv-heads.")],
    data: options.Data,
    out: options.Out,
    original_steps: Annotated[int, typer.Option(help="How many steps the original was trained.")],
    fraction: Annotated[float, typer.Option(help="The share of them to train now.")] = 0.05,
    kv_heads: Annotated[int | None, typer.Option(help="Convert to so many key/value heads first.")] = None,
    method: Annotated[str, typer.Option(help="Of the conversion: mean, first, random, aligned or factored.")] = "mean",
    original: Annotated[str | None, typer.Option(help="The model before its conversion, to compare with.")] = None,
    schedule_steps: Annotated[
        int | None, typer.Option(help="Length of the schedule, if not that of the original.")
    ] = None,
    tokenizer: options.Tokenizer = None,
    seqlen: options.Seqlen = 1024,
    batch: options.Batch = 8,
    micro_batch: options.MicroBatch = None,
    lr: options.Lr = 3e-4,
    warmup: options.Warmup = 0,
    schedule: options.Schedule = "cosine",
    min_lr_ratio: options.MinLrRatio = 0.1,
    weight_decay: options.WeightDecay = 0.1,
    beta2: options.Beta2 = 0.95,
    clip: options.Clip = 1.0,
    precision: options.Precision = "auto",
    compile: options.Compile = "off",
    attention: options.Attention = "hasten",
    recompute: options.Recompute = False,
    deterministic: options.Deterministic = False,
    seed: options.Seed = 0,
    eval_data: options.EvalData = None,
    eval_every: options.EvalEvery = 0,
    eval_rows: options.EvalRows = 64,
    log_every: options.LogEvery = 10,
    save_every: options.SaveEvery = 500,
    keep: options.Keep = 2,
    include: options.Include = "*",
    text_field: options.TextField = "text",
    token_dtype: options.TokenDtype = "auto",
    separator: options.Separator = None,
    tensorboard: options.Tensorboard = False,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Train a converted checkpoint on a little: same data, same schedule, continued where the original stopped."""
    given = {**context.params, "steps": 1, "start_step": 0, "schedule_steps": schedule_steps or max(1, original_steps)}
    with Display() as display:
        from hasten.train import uptrain as uptraining  # takes seconds: here, and not for --help

        config = uptraining.plan(options.make_config(given), original_steps, fraction)
        if kv_heads is not None:
            config = uptraining.convert(config, kv_heads, method, display.say)
            original = original or model
        report = uptraining.uptrain(config, display.listen, original=original)
    if display.end is not None:
        print(json.dumps(asdict(report)) if as_json else "\n".join([*summary(display.end), *lines(report)]))


def lines(report: Uptrained) -> list[str]:
    """The report for a reader."""
    found = [f"{report.steps} steps, {report.fraction:.1%} of the original's"]
    if report.original_loss is not None and report.before is not None and report.after is not None:
        losses = f"{report.original_loss:.4f} original, {report.before:.4f} converted, {report.after:.4f} uptrained"
        won = "" if report.gap_closed is None else f": {report.gap_closed:.0%} of the gap closed"
        found.append(f"held-out loss {losses}{won}")
    if report.kv_bytes is not None:
        before = "" if report.original_kv_bytes is None else f"{report.original_kv_bytes:,} before, "
        found.append(f"KV cache, bytes a token in 16 bits: {before}{report.kv_bytes:,} now")
    return found


__all__ = ["lines", "uptrain"]
