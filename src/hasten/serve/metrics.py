"""`/metrics`: what the server and its engine do, for Prometheus. No figure is of one tenant.

A registry for each app, so that two in one process stay apart. Told by calls.py; the engine is asked when somebody
looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from hasten.engine import Finished, Stats

FORMAT = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Figures of an app. stats: of its engine; num_waiting: calls without a first token."""

    def __init__(self, stats: Callable[[], Stats], num_waiting: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "hasten", "registry": self._registry}
        self._responses = Counter("responses", "Responses, by their status", ["status"], **own)
        self._finished = Counter("continuations", "Continuations that ended, by why", ["finish_reason"], **own)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts", **own)
        self._cached = Counter("cached_tokens", "Tokens of prompts that the prompt cache had", **own)
        self._restored = Counter("restored_tokens", "Of these, from host memory or disk", **own)
        self._generated = Counter("generated_tokens", "New tokens", **own)
        self._ttft = Histogram("ttft_seconds", "From request to first token", buckets=_TTFT_S, **own)
        self._tpot = Histogram("tpot_seconds", "Per token after the first", buckets=_TPOT_S, **own)
        self._registry.register(_Engine(stats, num_waiting))

    def responded(self, status: int) -> None:
        """A response begins."""
        self._responses.labels(str(status)).inc()

    def began(self, since_s: float) -> None:
        """A call that came at that time of `time.monotonic` has its first token."""
        self._ttft.observe(time.monotonic() - since_s)

    def ended(self, record: Finished) -> None:
        """A continuation ended; its prompt is counted with the first of them."""
        self._finished.labels(record.finish_reason).inc()
        self._generated.inc(len(record.token_ids))
        if record.tokens_per_s:
            self._tpot.observe(1 / record.tokens_per_s)
        if record.index == 0:
            self._prompt.inc(record.prompt_tokens)
            self._cached.inc(record.cached_tokens)
            self._restored.inc(record.restored_tokens)

    def text(self) -> bytes:
        """All of them, in the format of Prometheus."""
        return generate_latest(self._registry)


class _Engine:
    """Gauges that are read when somebody looks."""

    def __init__(self, stats: Callable[[], Stats], num_waiting: Callable[[], int]) -> None:
        self._stats, self._num_waiting = stats, num_waiting

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        values = {
            "hasten_calls_waiting": ("Calls without a first token", self._num_waiting()),
            "hasten_requests_queued": ("Requests that the engine has not begun", stats.num_waiting),
            "hasten_sequences_running": ("Sequences being computed", stats.num_running),
            "hasten_preemptions": ("Sequences computed again since the start", stats.num_preemptions),
        }
        for name, (text, value) in values.items():
            yield GaugeMetricFamily(name, text, value=value)
        pages = GaugeMetricFamily("hasten_pages", "Pages of the KV cache", labels=["kind", "state"])
        each = zip(stats.num_free_pages, stats.num_idle_pages, stats.num_pages, strict=True)
        for kind, (free, idle, total) in enumerate(each):
            for state, count in (("free", free), ("cached", idle), ("used", total - free - idle)):
                pages.add_metric([str(kind), state], count)
        yield pages


__all__ = ["FORMAT", "Metrics"]
