"""Plots from records: throughput over length, one panel for each head_dim, mask and phase, with the ceiling.

matplotlib is an extra; it is imported when a plot is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hasten.bench.records import Record, newest
from hasten.bench.tables import CASES
from hasten.errors import ArgumentError, MissingExtraError

#: implementation -> colour (a palette safe for the colour-blind, Okabe and Ito); ours are warm and drawn wider
_COLOURS = {
    "hasten_portable": "#D55E00",
    "hasten_hopper": "#8B0000",
    "hasten_blockwise": "#C9A27E",
    "sdpa_cudnn": "#0072B2",
    "sdpa_flash": "#56B4E9",
    "sdpa_efficient": "#CC79A7",
    "sdpa_math": "#999999",
    "flex": "#009E73",
    "flash_attn_2": "#E69F00",
    "flash_attn_3": "#F0E442",
    "flash_attn_4": "#000000",
}


def plot(all_records: Sequence[Record], path: Path) -> None:
    """Write one picture (format by the suffix) of the last run of each case.

    Raises MissingExtraError without matplotlib, ArgumentError where there is nothing to plot.
    """
    some = [record for record in all_records if record["kind"] == "attention" and record["status"] == "ok"]
    some = newest(some, CASES["attention"])
    if not some:
        raise ArgumentError(
            "file", "records of attention that were measured", "none", "run hasten bench attention --out"
        )
    figure, axes = _panels(some)
    for panel, axis in axes.items():
        own = [record for record in some if _panel(record) == panel]
        _draw(axis, panel, own)
    handles: dict[str, Any] = {}
    for axis in axes.values():
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 6), frameon=False
    )
    first = some[0]
    figure.suptitle(
        f"Attention on {first['device']}, {first['dtype']}, torch {first['torch']}, commit {first['commit']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


Panel = tuple[str, str, int]


def _panel(record: Record) -> Panel:
    return record["phase"], record["mask"], record["head_dim"]


def _panels(some: Sequence[Record]) -> tuple[Any, dict[Panel, Any]]:
    """A figure with rows of phase and mask and columns of head_dim."""
    try:
        from matplotlib.figure import Figure  # an extra; Figure alone needs no display and keeps no global state
    except ImportError as error:
        raise MissingExtraError("bench", "a plot") from error
    rows = list(dict.fromkeys(_panel(record)[:2] for record in some))
    head_dims = sorted({record["head_dim"] for record in some})
    figure = Figure(figsize=(1.5 + 3.6 * len(head_dims), 1.2 + 2.7 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(head_dims), squeeze=False, sharex=True, sharey="row")
    used = {_panel(record) for record in some}
    axes: dict[Panel, Any] = {}
    for row, (phase, mask) in enumerate(rows):
        for column, head_dim in enumerate(head_dims):
            if (phase, mask, head_dim) in used:
                axes[phase, mask, head_dim] = grid[row][column]
            else:
                grid[row][column].set_axis_off()
    return figure, axes


def _draw(axis: Any, panel: Panel, own: Sequence[Record]) -> None:
    names = sorted({record["implementation"] for record in own}, key=lambda name: (not name.startswith("hasten"), name))
    for name in names:
        points = sorted((record["seqlen"], record["tflops"]) for record in own if record["implementation"] == name)
        is_ours = name.startswith("hasten")
        style = {"linewidth": 2.4 if is_ours else 1.3, "zorder": 3 if is_ours else 2}
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, color=_COLOURS.get(name), **style)
    ceiling = own[0].get("matmul_tflops")
    highest = max(record["tflops"] for record in own)
    if ceiling and ceiling < 4 * highest:
        axis.axhline(ceiling, color="#666666", linestyle=":", linewidth=1, label="matrix product")
    phase, mask, head_dim = panel
    axis.set_title(f"{phase}, {mask}, head_dim {head_dim}", fontsize=9)
    axis.set_xscale("log", base=2)
    lengths = sorted({record["seqlen"] for record in own})
    axis.set_xticks(lengths, [_brief(length) for length in lengths], fontsize=8)
    axis.set_ylim(bottom=0)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_ylabel("TFLOP/s", fontsize=8)
    axis.grid(alpha=0.25)


def _brief(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
