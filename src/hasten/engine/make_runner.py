"""Which runner an engine has: captured steps on a GPU, blocks of fixed shapes if it is to be reproducible."""

from __future__ import annotations

from typing import Any

from hasten.cache.paged import PagedCache
from hasten.engine.batch_runner import BatchRunner
from hasten.engine.block_runner import BlockRunner
from hasten.engine.graphs import capture_for
from hasten.engine.runner import step_threads
from hasten.errors import ArgumentError


def make_runner(
    model: Any,
    cache: PagedCache,
    *,
    reproducible: bool,
    cuda_graphs: bool | None,
    compile: bool,
    most_rows: int,
    context: int | None,
) -> BatchRunner:
    """The runner for these options of `Engine`; raises ArgumentError for options that contradict each other."""
    threads = step_threads(model)
    if reproducible:
        for name, value in (("cuda_graphs", cuda_graphs), ("compile", compile)):
            if value:
                raise ArgumentError(name, "False beside reproducible", value, "leave one of them out")
        return BlockRunner(model, cache, step_threads=threads)
    capture = capture_for(next(model.parameters()).device, cuda_graphs)
    if compile and capture is None:
        raise ArgumentError("compile", "False without CUDA graphs", True, "leave cuda_graphs out, on CUDA")
    return BatchRunner(
        model,
        cache,
        step_threads=threads,
        capture=capture,
        most_rows=most_rows,
        context=context,
        backend="inductor" if compile else None,
    )


__all__ = ["make_runner"]
