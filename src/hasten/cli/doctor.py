"""`hasten doctor`: what is installed, what each feature gets on this machine, and whether its results are right.

Exit code 1 if the self-check fails. All looking is in `hasten.bench`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from hasten import config
from hasten.bench import machine, selfcheck
from hasten.bench.selfcheck import Exactness


def doctor(as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False) -> None:
    """Show what is installed, what each feature gets here, and check exactness once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    exactness = [selfcheck.check_exactness(device, dtype) for dtype in selfcheck.DTYPES]
    facts, served, not_served = machine.describe(), selfcheck.served_by(device), selfcheck.not_served()
    is_exact = all(result.is_exact for result in exactness)
    if as_json:
        checks = [_fields(result) for result in exactness]
        found = {"installed": facts, "environment": config.environment(), "served_by": served, "exactness": checks}
        print(json.dumps({**found, "not_served": not_served, "is_exact": is_exact}))
    else:
        _show(facts, served, not_served, exactness, device)
    raise typer.Exit(0 if is_exact else 1)


def _fields(result: Exactness) -> dict[str, Any]:
    return {**vars(result), "is_exact": result.is_exact}


def _show(
    facts: dict[str, str | None],
    served: dict[str, dict[str, str]],
    not_served: dict[str, str],
    exactness: list[Exactness],
    device: torch.device,
) -> None:
    console = Console(soft_wrap=True)
    installed = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        installed.add_row(name, value or "—")
    console.print("Installed", style="bold")
    console.print(installed)
    console.print("\nEnvironment variables", style="bold")
    variables = Table.grid(padding=(0, 2))
    for name, value in config.environment().items():
        variables.add_row(name, "unset" if value is None else repr(value), config.VARIABLES[name])
    console.print(variables)
    console.print(f"\nImplementation of each feature on {device.type}", style="bold")
    dtypes = list(next(iter(served.values())))
    features = Table("feature", *dtypes, box=None, pad_edge=False)
    for feature, by_dtype in served.items():
        features.add_row(feature, *(by_dtype[dtype] for dtype in dtypes))
    console.print(features)
    for name, reason in not_served.items():
        console.print(f"{name} is not served: {reason}", highlight=False)
    console.print(
        "\nExactness: relative error against float64 (allowed: twice PyTorch's in the same dtype)", style="bold"
    )
    for result in exactness:
        parts = (f"{name} {value:.1e} ({result.allowed[name]:.1e})" for name, value in result.errors.items())
        verdict = "PASS" if result.is_exact else "FAIL"
        console.print(f"{verdict}  {result.implementation} {result.dtype}: {', '.join(parts)}", highlight=False)
