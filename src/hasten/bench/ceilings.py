"""What this machine can do at best, measured in the same run: a matrix product and a copy.

A ceiling by datasheet is never reached; these two are, by the machine's own libraries.
"""

from __future__ import annotations

import torch

from hasten.bench.timing import Clock, Plan, Timing, Work, measure
from hasten.ops.cost import Rates

_MATRIX = {"cuda": 8192, "cpu": 1536}
_COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
_PLAN = {"cuda": Plan(budget_ms=60, rounds=2, min_count=10), "cpu": Plan(budget_ms=100, rounds=2, rest_ms=0)}


def measure_ceilings(device: torch.device, dtype: torch.dtype, clock: Clock) -> tuple[Rates, dict[str, Timing]]:
    """The matrix rate in `dtype` and the rate of a copy (bytes read and written), and the times behind them.

    The best call counts, not the median: a ceiling is what can be reached.
    """
    size = _MATRIX.get(device.type, _MATRIX["cpu"])
    kind = device.type if device.type in _PLAN else "cpu"
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.empty(_COPY_BYTES[kind], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    works = {
        "matmul": Work(lambda number: torch.mm(a, b, out=product)),
        "copy": Work(lambda number: target.copy_(source)),
    }
    for work in works.values():
        work.call(0)
    timings = measure(clock, works, _PLAN[kind])
    fastest = {name: min(timing.times_ms) / 1e3 for name, timing in timings.items()}
    return Rates(2 * size**3 / fastest["matmul"], 2 * source.nbytes / fastest["copy"]), timings
