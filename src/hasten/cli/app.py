"""The `hasten` command: which verbs exist, and how an error leaves the program.

Each verb lives in `hasten.cli.<verb>`, loaded only when that verb runs: a Typer app named `app` (a verb with
subcommands) or a function named as the verb. This module knows no tensor, no model and no option of any verb.
Data goes to stdout, talk to stderr. Exit codes: 0 done, 2 an error the user can act on, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
import traceback as tracebacks
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group

from hasten import config
from hasten.errors import HastenError

# verb -> the line `hasten --help` shows, in the order it shows them
VERBS = {
    "generate": "Stream text from a model (the built-in one when none is named), then its figures.",
    "serve": "Serve a model over HTTP, as the OpenAI clients ask for it.",
    "explain": "Say which implementation a call gets here and why, with its FLOPs, bytes and roofline time.",
    "convert": "Turn a checkpoint into one of another architecture, with a report of every tensor.",
    "train": "Train a model on local data; the same command resumes it, to the bit.",
    "uptrain": "Train a converted checkpoint on a little, from where the original's schedule stopped.",
    "cache": "Look into, check, prune and fill a folder of prompt caches.",
    "bench": "Measure hasten beside its peers on this machine.",
    "doctor": "Show what is installed, what each feature gets here, and check exactness once.",
}


def load_verb(name: str) -> Any:
    """Import the module of a verb and return its click command."""
    module = importlib.import_module(f"hasten.cli.{name}")
    if hasattr(module, "app"):
        return get_group(module.app)
    single = typer.Typer(add_completion=False)
    single.command(name)(getattr(module, name))
    return get_command(single)


class VerbGroup(TyperGroup):
    """A group that lists its verbs from `VERBS` and imports one only to run it."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        for name, line in VERBS.items():
            self.add_command(TyperCommand(name, help=line))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the verb as every group does, then put the loaded command in place of the listed line."""
        name, listed, rest = super().resolve_command(ctx, args)
        return name, load_verb(name) if name in VERBS else listed, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; an error raised on purpose becomes one line on stderr and exit code 2."""
        try:
            return super().invoke(ctx)
        except HastenError as error:
            if ctx.params.get("traceback"):
                tracebacks.print_exc()
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from error


def print_version(is_asked: bool) -> None:
    """Print the installed version and stop, when asked."""
    if is_asked:
        from importlib.metadata import version  # only this option needs it

        print(version("hasten"))
        raise typer.Exit()


def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Faster Transformers, to train and to run, with the same results."""
    threads = config.num_threads()
    if threads is not None:
        import torch  # this module knows torch only for the thread count

        torch.set_num_threads(threads)


def build() -> Any:
    """Return the click command of the whole program."""
    app = typer.Typer(cls=VerbGroup, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
    app.callback()(options)
    return get_command(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `hasten` with the given arguments (the process's own by default) and exit with its code."""
    build().main(args=arguments, prog_name="hasten")
