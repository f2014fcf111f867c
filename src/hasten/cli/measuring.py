"""What the verbs of `hasten bench` share: options by the same names, and where their records go."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from hasten.bench import records
from hasten.bench.records import Record
from hasten.errors import ArgumentError

Device = Annotated[str | None, typer.Option(help="cuda or cpu; by default the GPU where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; by default bf16 on a GPU, fp32 on a CPU.")]
Out = Annotated[Path | None, typer.Option(help="Append the records to this file, one JSON line each.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the records instead of tables.")]
Commit = Annotated[str | None, typer.Option(help="Commit of the sources, where git is not there to say.")]


class Collector:
    """Where records go as they are made: to a file, to stdout as JSON, and together for the tables at the end."""

    def __init__(self, path: Path | None, as_json: bool) -> None:
        self.path, self.as_json = path, as_json
        self.records: list[Record] = []

    def emit(self, made: Sequence[Record]) -> None:
        """Keep records, and write them at once: a run that is cut short keeps what it has."""
        self.records += made
        if self.path is not None:
            records.append(self.path, made)
        if self.as_json:
            for record in made:
                print(records.to_line(record), flush=True)


def find_device(name: str | None) -> torch.device:
    """The device asked for, or the GPU where there is one; raises ArgumentError for one that is not here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError("device", "cuda or cpu", repr(name), "leave it out to have it chosen") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device", "a device of this machine", repr(name), "PyTorch sees no GPU; see hasten doctor")
    return device


def tell(line: str) -> None:
    """A line of talk, to stderr."""
    print(line, file=sys.stderr, flush=True)
