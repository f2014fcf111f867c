"""`hasten convert longformer` and `hasten convert led`: a checkpoint for long texts, what was done and checked.

The report goes to stdout, progress to stderr. All work is in `hasten.convert`.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local Hugging Face checkpoint.")]
Out = Annotated[str, typer.Argument(metavar="OUT", help="The folder to write.")]
Length = Annotated[int, typer.Option(help="Tokens the result takes.")]
Window = Annotated[str, typer.Option(help="Both sides together, even; or one a layer: 32,64,128.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")]


def longformer(
    model: Model,
    out: Out,
    max_length: Length = 4096,
    window: Window = "512",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """BERT, RoBERTa, XLM-R, CamemBERT, DistilBERT or ELECTRA as a Longformer; equal where the window reaches all."""
    _convert("longformer", model, out, max_length, window, overwrite, as_json)


def led(
    model: Model,
    out: Out,
    max_length: Length = 16384,
    window: Window = "1024",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """BART as an LED: Longformer attention in the encoder, the decoder as it was."""
    _convert("led", model, out, max_length, window, overwrite, as_json)


def _convert(kind: str, model: str, out: str, max_length: int, window: str, overwrite: bool, as_json: bool) -> None:
    console = Console(stderr=True, highlight=False)
    with console.status("starting PyTorch and transformers") as status:
        import transformers  # takes seconds: here, and not for --help

        from hasten.convert import long_folder

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        report = long_folder.convert_folder(
            kind,
            model,
            out,
            max_length=max_length,
            window=long_folder.parse_windows(window),
            overwrite=overwrite,
            progress=status.update,
        )
    print(json.dumps(report.to_dict()) if as_json else "\n".join([*report.lines(), f"written to {out}"]))


__all__ = ["led", "longformer"]
