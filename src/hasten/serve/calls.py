"""Between the event loop and the engine's thread: prompts go in, events come out, who leaves is cancelled.

A call is the prompts of one HTTP request. Those that wait for their first token are counted, and beyond a limit
new calls are refused. Knows no JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

from hasten.engine import Engine, Failed, Finished, Handle, Sampling, Token
from hasten.errors import HastenError
from hasten.serve.metrics import Metrics
from hasten.serve.refusals import Refusal, refusal_of, shutting_down

Prompt = str | Sequence[int]
Event = Token | Finished | Failed


class Calls:
    """The calls of a server on their way. max_waiting: so many may wait for their first token; more are refused."""

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self.engine, self.max_waiting, self.num_waiting, self.num_open = engine, max_waiting, 0, 0
        self.metrics = Metrics(engine.stats, lambda: self.num_waiting)

    @contextlib.asynccontextmanager
    async def open(self, prompts: Sequence[Prompt], sampling: Sampling, salt: str) -> AsyncIterator[Call]:
        """A call whose prompts are with the engine; what is left of it is cancelled in the end.

        Raises Refusal: 429 if too many wait, 400 for a prompt that cannot be served.
        """
        if self.num_waiting >= self.max_waiting:
            message = f"{self.num_waiting} requests wait for their first token, the most are {self.max_waiting}; later"
            raise Refusal(429, message, code="queue_full", headers={"Retry-After": "1"})
        call = Call(self)
        try:
            await asyncio.to_thread(call.submit, prompts, sampling, salt)
            yield call
        except Refusal:
            raise
        except HastenError as error:
            raise refusal_of(error) from error
        finally:
            call.leave()


class Call:
    """The prompts of one request, with the engine."""

    def __init__(self, calls: Calls) -> None:
        self._calls, self._loop = calls, asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._handles: list[Handle] = []
        self._is_over, self._is_waiting, self._since_s = False, True, time.monotonic()
        self._num_left = 0
        calls.num_waiting += 1
        calls.num_open += 1

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling, salt: str) -> None:
        """Give the prompts to the engine, in another thread, since to tokenise takes time."""
        self._num_left = len(prompts) * sampling.n
        for number, prompt in enumerate(prompts):

            def emit(event: Event, number: int = number) -> None:
                if not self._is_over:
                    with contextlib.suppress(RuntimeError):  # the loop has ended: nobody reads
                        self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, event))

            if not self._is_over:
                self._handles.append(self._calls.engine.submit(prompt, sampling, salt=salt, on_event=emit))
        if self._is_over:  # left while this thread was at work
            self._cancel()

    async def events(self) -> AsyncIterator[tuple[int, Token | Finished]]:
        """(number of the prompt, event) as they come, until all have ended. Raises what a prompt failed with."""
        while self._num_left:
            number, event = await self._queue.get()
            if isinstance(event, Failed):
                raise refusal_of(event.error)
            if self._is_waiting:
                self._calls.metrics.began(self._since_s)
                self._stop_waiting()
            if isinstance(event, Finished):
                self._num_left -= 1
                self._calls.metrics.ended(event)
                if event.finish_reason == "cancelled":
                    raise shutting_down()
            yield number, event

    def leave(self) -> None:
        """Nobody reads any more: cancel what is on its way."""
        self._is_over = True
        self._stop_waiting()
        self._calls.num_open -= 1
        self._cancel()

    def _cancel(self) -> None:
        if self._num_left:
            for handle in list(self._handles):
                handle.cancel()

    def _stop_waiting(self) -> None:
        self._calls.num_waiting -= self._is_waiting
        self._is_waiting = False


__all__ = ["Call", "Calls"]
