"""How a training run is shown: a bar on a terminal, a line now and then elsewhere; and what it brought, at the end.

Shared by `hasten train` and `hasten uptrain`. All talk goes to stderr; knows only the events of `hasten.train`.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

if TYPE_CHECKING:
    from hasten.train import Event, Finished


class Display(AbstractContextManager["Display"]):
    """Shows events as they come; `listen` is what `train` is given."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task: TaskID | None = None
        self._is_open = False
        self.end: Finished | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_open:
            self._bar.stop()

    def listen(self, event: Event) -> None:
        """Show one event."""
        show: Any = getattr(self, f"_{type(event).__name__.lower()}")
        show(event)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, style="dim", soft_wrap=True, markup=False)

    def _started(self, event: Any) -> None:
        epochs = f"{event.rows_per_epoch:,} rows an epoch of {event.num_tokens:,} tokens"
        many = f" · {event.processes} processes" if event.processes > 1 else ""
        self.say(f"{event.num_parameters / 1e6:,.1f} M parameters · {epochs} · {event.device}{many}")
        self.say(f"{event.precision} · attention: {event.attention} · loss: {event.loss}")
        if event.step:
            self.say(f"resumed after step {event.step}")
        self._task = self._bar.add_task("", total=event.steps, completed=event.step)
        self._bar.start()
        self._is_open = True

    def _stepped(self, event: Any) -> None:
        mfu = "—" if event.mfu is None else f"{event.mfu:.1%}"
        left = timedelta(seconds=round(event.left_s))
        text = f"loss {event.loss:.4f} · {event.tokens_per_s:,.0f} tokens/s · MFU {mfu} · {left} left"
        if self.console.is_terminal and self._task is not None:
            self._bar.update(self._task, completed=event.step, description=text)
        else:
            self.say(f"step {event.step} · {text}")

    def _evaluated(self, event: Any) -> None:
        self.say(f"held-out loss {event.loss:.4f} (perplexity {perplexity(event.loss)}) after step {event.step}")

    def _saved(self, event: Any) -> None:
        if not self.console.is_terminal:
            self.say(f"saved {event.path} in {event.seconds:.2f} s")

    def _warned(self, event: Any) -> None:
        self.console.print(f"warning: {event.text}", style="yellow", soft_wrap=True, markup=False)

    def _finished(self, event: Any) -> None:
        self.end = event  # the verb says it, on stdout


def perplexity(loss: float) -> str:
    """e to the loss, short."""
    return f"{math.exp(loss):,.2f}" if loss < 20 else f"e^{loss:.1f}"


def summary(end: Finished) -> list[str]:
    """What a run brought, in a line or two."""
    if not end.is_whole:
        return [f"stopped after step {end.step}, and saved; the same command goes on from there"]
    lines = [f"{end.step} steps in {timedelta(seconds=round(end.seconds))} · model in {end.model}"]
    if end.eval_first is not None and end.eval_last is not None:
        change = f"{end.eval_first:.4f} before, {end.eval_last:.4f} after"
        lines.append(f"held-out loss {change} (perplexity {perplexity(end.eval_first)}, {perplexity(end.eval_last)})")
    return lines


__all__ = ["Display", "perplexity", "summary"]
