"""What an engine is doing, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.engine.core import Core


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What an engine is doing. num_free_pages, num_pages: by kind of layer. Counts are since it was made.

    num_idle_pages: by kind, those that the prompt cache alone holds, and parts with.
    num_drafted, num_accepted: tokens computed as a guess, and those of them that came true.
    num_graphs: sizes of decode steps that have been captured as CUDA graphs; num_replays: steps computed by them.
    no_graphs: why decode steps are none, or None. no_compile: why they are not compiled, or None.
    """

    num_waiting: int
    num_running: int
    num_free_pages: tuple[int, ...]
    num_idle_pages: tuple[int, ...]
    num_pages: tuple[int, ...]
    num_steps: int
    num_positions: int
    num_preemptions: int
    num_drafted: int
    num_accepted: int
    num_graphs: int
    num_replays: int
    no_graphs: str | None
    no_compile: str | None

    @classmethod
    def of(cls, core: Core) -> Stats:
        """Those of now."""
        scheduler, steps, compiled = core.scheduler, core.runner.steps, core.runner.compiled
        return cls(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_free_pages=scheduler.ledger.num_free,
            num_idle_pages=tuple(pool.num_idle for pool in scheduler.ledger.pools),
            num_pages=core.runner.cache.num_pages,
            num_steps=core.num_steps,
            num_positions=core.num_positions,
            num_preemptions=scheduler.num_preemptions,
            num_drafted=core.num_drafted,
            num_accepted=core.num_accepted,
            num_graphs=0 if steps is None else steps.num_graphs,
            num_replays=0 if steps is None else steps.num_replays,
            no_graphs="cuda_graphs is off" if steps is None else steps.refusal,
            no_compile="compile is off" if compiled is None else compiled.refusal,
        )


__all__ = ["Stats"]
