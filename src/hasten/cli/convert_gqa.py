"""`hasten convert gqa`: fewer key/value heads; what that saves, before, and what was done and checked, after.

The table of a dry run and the report go to stdout, the rest to stderr. All work is in `hasten.convert`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hasten.errors import ArgumentError

if TYPE_CHECKING:
    from hasten.convert.kv_cost import Cost


def gqa(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A local Hugging Face checkpoint; or builtin.")],
    out: Annotated[str | None, typer.Argument(metavar="OUT", help="The folder to write.")] = None,
    kv_heads: Annotated[
        str | None, typer.Option(help="Key/value heads to keep; 1 is multi-query; or one a layer: 8,8,4,4.")
    ] = None,
    method: Annotated[str, typer.Option(help="mean, first, random, aligned or factored.")] = "mean",
    groups: Annotated[str, typer.Option(help="contiguous, clustered or uneven.")] = "contiguous",
    calibration: Annotated[
        list[Path] | None, typer.Option(help="A text file to weigh directions by; may be given again.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random method.")] = 0,
    gpu: Annotated[str, typer.Option(help="The GPU of the table.")] = "H200",
    context: Annotated[int | None, typer.Option(help="Tokens in the table; the model's longest if none.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only the table; nothing is written.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Merge key/value heads (Ainslie 2023): a smaller KV cache, faster decoding, a little quality to train back."""
    console = Console(stderr=True, highlight=False)
    with console.status("starting PyTorch and transformers") as status:
        import transformers  # takes seconds: here, and not for --help

        from hasten.convert import gqa_folder, kv_cost, source
        from hasten.models import builtin

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        path = str(builtin.path()) if model == "builtin" else model
        shapes = source.load_shapes(path)
        rows = kv_cost.costs(shapes, gpu=gpu, context=context)
        length = context or kv_cost.longest_context(shapes.config)
    lines = table(rows, gpu, length, str(shapes.dtype).removeprefix("torch."))
    if dry_run:
        print(json.dumps([asdict(row) for row in rows]) if as_json else "\n".join(lines))
        return
    wanted, folder = _numbers(kv_heads), _folder(out)
    print("\n".join(lines), file=sys.stderr)
    with console.status("converting") as status:
        report = gqa_folder.convert_folder(
            path,
            folder,
            wanted,
            method=method,
            groups=groups,
            calibration=calibration or (),
            seed=seed,
            overwrite=overwrite,
            progress=status.update,
        )
    print(json.dumps(report.to_dict()) if as_json else "\n".join([*report.lines(), f"written to {folder}"]))


def _numbers(text: str | None) -> int | list[int]:
    try:
        found = [int(part) for part in (text or "").split(",")]
    except ValueError:
        hint = "--dry-run shows what each number costs"
        raise ArgumentError("--kv-heads", "a number, or one a layer: 8,8,4,4", repr(text or ""), hint) from None
    return found[0] if len(found) == 1 else found


def _folder(out: str | None) -> str:
    if out is None:
        raise ArgumentError("OUT", "a folder to write", "none", "give one, or --dry-run")
    return out


def table(rows: list[Cost], gpu: str, context: int, dtype: str) -> list[str]:
    """The rows as lines of text, with a heading that says what they suppose."""
    head = ("KV heads", "KV/token", "KV/sequence", "weights", "largest batch", "tokens/s, one", "tokens/s, largest")
    body = [
        (
            str(row.num_kv_heads),
            _bytes(row.kv_bytes_per_token + row.source_bytes_per_token),
            _bytes(row.kv_bytes),
            _bytes(row.weight_bytes),
            f"{row.largest_batch:,}",
            f"{row.tokens_per_s_single:,.0f}",
            f"{row.tokens_per_s_largest:,.0f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *body)]
    title = f"{gpu}, {dtype}, {context:,} tokens a sequence; tokens/s: ceilings by memory bandwidth, not measurements"
    if any(row.source_bytes_per_token for row in rows):
        title += "; with an encoder's text as long"
    return [title, *lines]


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError
