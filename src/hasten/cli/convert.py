"""`hasten convert ...`: one architecture into another, as a checkpoint that plain transformers loads.

Each kind of conversion has a thin file of its own; all work is in `hasten.convert`.
"""

from __future__ import annotations

import typer

from hasten.cli import convert_gqa, convert_long

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Turn a checkpoint into one of another architecture."
)


@app.callback()
def kinds() -> None:
    """Turn a checkpoint into one of another architecture."""


# one line a kind: app.command()(convert_<kind>.<kind>)
app.command()(convert_gqa.gqa)
app.command()(convert_long.longformer)
app.command()(convert_long.led)
