"""`hasten bench`: measure attention and training beside the peers on this machine; tables and plots of records.

Tables and JSON lines go to stdout, progress to stderr. All measuring is in `hasten.bench`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hasten.bench import attention as attention_suite
from hasten.bench import peers as peers_module
from hasten.bench import plots, records, suites, tables
from hasten.bench.problems import Pattern, Problem, parse_dtype
from hasten.bench.records import Record
from hasten.bench.timing import Plan
from hasten.cli import bench_decode, bench_generate, bench_longformer, bench_prompt_cache
from hasten.cli.measuring import AsJson, Collector, Commit, Device, Dtype, Out, find_device, tell
from hasten.errors import ArgumentError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Measure hasten beside its peers on this machine.")
app.command("decode")(bench_decode.decode)
app.command("generate")(bench_generate.generate)
app.command("longformer")(bench_longformer.longformer)
app.command("prompt-cache")(bench_prompt_cache.prompt_cache)

#: What is measured when nothing is said, by kind of device: the papers' grid on a GPU, seconds of work on a CPU.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"head_dim": "64,128,256", "seqlen": "512..16384", "tokens": 16384, "width": 2048, "dtype": "bf16"},
    "cpu": {"head_dim": "64", "seqlen": "256..1024", "tokens": 1024, "width": 512, "dtype": "fp32"},
}

CausalMask = Annotated[bool, typer.Option("--causal", help="Causal mask (with --full, both; that is the default).")]
Masks = Annotated[
    list[str] | None, typer.Option(help="blocks:PERCENT, documents:MEAN, packed:MEAN length; may be repeated.")
]
Suite = Annotated[
    str | None, typer.Option(help="A named suite instead of a grid: hopper. --head-dim and --seqlen choose from it.")
]
Peers = Annotated[str, typer.Option(help="auto, all, none, or names; flex compiles each problem for seconds.")]


@app.command()
def attention(
    head_dim: Annotated[str | None, typer.Option(help="Sizes, such as 64,128.")] = None,
    seqlen: Annotated[str | None, typer.Option(help="Lengths, such as 512..16384 (doubling).")] = None,
    causal: CausalMask = False,
    full: Annotated[bool, typer.Option("--full", help="No mask.")] = False,
    window: Annotated[list[str] | None, typer.Option(help="A window LEFT,RIGHT; may be repeated.")] = None,
    longformer: Annotated[list[str] | None, typer.Option(help="WINDOW,GLOBAL tokens; may be repeated.")] = None,
    mask: Masks = None,
    suite: Suite = None,
    rows: Annotated[str, typer.Option(help="Which rows of the suite, such as longformer,window.")] = "",
    budget: Annotated[float | None, typer.Option(min=0, help="Begin no problem after so many seconds.")] = None,
    forward: Annotated[bool, typer.Option("--forward", help="Forward only.")] = False,
    backward: Annotated[bool, typer.Option("--backward", help="Backward only.")] = False,
    dtype: Dtype = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="batch x seqlen.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="heads x head_dim.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Instead of --tokens.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Instead of --width.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="As many as heads by default.")] = None,
    peers: Peers = "auto",
    implementation: Annotated[list[str] | None, typer.Option(help="Which of ours; may be repeated.")] = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Ours a second time, so asked.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Half the calls, and only the first of ours.")] = False,
    device: Device = None,
    out: Out = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture, such as attention.png.")] = None,
    as_json: AsJson = False,
    commit: Commit = None,
) -> None:
    """Attention on a grid of sizes: ours beside every peer here, checked first, then timed in turns."""
    place = find_device(device)
    usual = DEFAULTS.get(place.type, DEFAULTS["cpu"])
    patterns = _patterns(causal, full, window or [], longformer or [], mask or [])
    kind = parse_dtype(dtype or usual["dtype"])
    if suite or rows:
        if patterns or tokens or width or batch or heads or kv_heads:
            hint = "--rows, --head-dim and --seqlen choose"
            raise ArgumentError("suite", "no masks and sizes beside it", "both", hint)
        problems = _chosen(suite or "hopper", rows, kind, head_dim, seqlen)
    else:
        total = {"tokens": tokens or usual["tokens"], "width": width or usual["width"]}
        lengths = {"head_dim": head_dim or usual["head_dim"], "seqlen": seqlen or usual["seqlen"]}
        problems = _grid(lengths, patterns, kind, {**total, "batch": batch, "heads": heads, "kv_heads": kv_heads})
    ours = implementation or (list(peers_module.our_implementations(place)[:1]) if quick else [])
    options = attention_suite.Options(
        problems=problems,
        peers=peers_module.find_peers(peers.split(","), place, ours, deterministic),
        device=place,
        phases=["forward"] * forward + ["backward"] * backward or attention_suite.PHASES,
        plan=attention_suite.quicker(Plan()) if quick else Plan(),
        budget_s=budget,
        commit=commit,
    )
    made = Collector(out, as_json)
    attention_suite.run(options, made.emit, tell)
    show(made)
    if plot:
        plots.plot(made.records, plot)
        tell(f"wrote {plot}")


@app.command("train")
@app.command(hidden=True)
def training(
    model: Annotated[str, typer.Option(help="Shapes, separated by commas.")] = "",
    attention: Annotated[str, typer.Option(help="What serves attention in the model.")] = "eager,sdpa,hasten",
    shape: Annotated[str, typer.Option(help="BATCHxLENGTH, separated by commas; each model's own if none.")] = "",
    compiled: Annotated[bool, typer.Option("--compile", help="Measure each under torch.compile as well.")] = False,
    modes: Annotated[str, typer.Option(help="off, default, reduce-overhead, max-autotune, instead.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Steps to time, after three to warm up.")] = 10,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = None,
    as_json: AsJson = False,
    commit: Commit = None,
) -> None:
    """A training step of a whole model: forward, backward and optimizer, with each attention."""
    from hasten.bench import training as training_suite  # loads transformers, seconds that the other verbs save

    place = find_device(device)
    usual = training_suite.DEFAULTS.get(place.type, training_suite.DEFAULTS["cpu"])
    options = training_suite.Options(
        models=(model or usual["models"]).split(","),
        shapes=[training_suite.parse_shape(text) for text in shape.split(",")] if shape else (),
        attentions=attention.split(","),
        compiles=modes.split(",") if modes else ("off", "default") if compiled else ("off",),
        steps=steps,
        dtype=parse_dtype(dtype or usual["dtype"]),
        device=place,
        commit=commit,
    )
    made = Collector(out, as_json)
    training_suite.run(options, made.emit, tell)
    show(made)


@app.command("table")
def table(file: Annotated[list[Path], typer.Argument(help="Files of records.")]) -> None:
    """Markdown tables of the last run of each case."""
    print("\n\n".join(grid.to_markdown() for grid in tables.grids(_read(file))))


@app.command("plot")
def plot_records(
    file: Annotated[list[Path], typer.Argument(help="Files of records.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("attention.png"),
) -> None:
    """A picture of the last run of each attention case."""
    plots.plot(_read(file), out)
    tell(f"wrote {out}")


def show(made: Collector) -> None:
    """Print the tables, unless JSON was asked for."""
    if not made.as_json:
        console = Console(width=None if sys.stdout.isatty() else 240)
        for grid in tables.grids(made.records):
            console.print(to_rich(grid))
    if made.path is not None:
        tell(f"{len(made.records)} records in {made.path}")


def to_rich(grid: tables.Grid) -> Table:
    """A table for a terminal, the best of each row marked."""
    made = Table(title=grid.title, title_justify="left", title_style="bold")
    for number, column in enumerate(grid.columns):
        made.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in grid.rows:
        made.add_row(*(Text(cell.text, style="bold green" if cell.is_best else "") for cell in row))
    return made


def _patterns(causal: bool, full: bool, windows: list[str], longformers: list[str], masks: list[str]) -> list[Pattern]:
    """The masks asked for."""
    asked = [Pattern(right=0)] * causal + [Pattern()] * full
    asked += [Pattern.parse(f"window:{text}") for text in windows]
    asked += [Pattern.parse(f"longformer:{text}") for text in longformers]
    return asked + [Pattern.parse(text) for text in masks]


def _grid(
    lengths: dict[str, str], patterns: list[Pattern], dtype: torch.dtype, sizes: dict[str, int | None]
) -> list[Problem]:
    """Every head_dim, length and mask, causal and full if none is named; the rest of the sizes as given."""
    return list(
        suites.Grid(
            head_dims=suites.parse_sizes("head-dim", lengths["head_dim"]),
            seqlens=suites.parse_sizes("seqlen", lengths["seqlen"]),
            patterns=patterns or [Pattern(right=0), Pattern()],
            dtype=dtype,
            **sizes,  # type: ignore[arg-type]
        )
    )


def _chosen(suite: str, rows: str, dtype: torch.dtype, head_dim: str | None, seqlen: str | None) -> list[Problem]:
    """The problems of a suite, of some rows and sizes where these are named."""
    problems = suites.find_problems(suite, rows.split(",") if rows else [], dtype)
    if head_dim:
        problems = [one for one in problems if one.head_dim in suites.parse_sizes("head-dim", head_dim)]
    if seqlen:
        problems = [one for one in problems if one.seqlen in suites.parse_sizes("seqlen", seqlen)]
    if not problems:
        raise ArgumentError(
            "suite", "rows of those sizes", "none", "leave out --head-dim and --seqlen to have them all"
        )
    return problems


def _read(files: Sequence[Path]) -> list[Record]:
    return [record for file in files for record in records.read(file)]
