"""Time tile shapes of the portable kernels on this GPU: the measurement behind `ops/portable/table.py`.

Every candidate is compiled first, in parallel processes that fill Triton's cache, checked against the
others' result, then timed. The winner of a (phase, head_dim) is the best geometric mean over the shapes.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from hasten.bench.timing import CudaClock, Work
from hasten.masks import Causal, Full, Mask
from hasten.ops.call import Call
from hasten.ops.portable import launch, table

# (rows, keys, warps, stages) to try, by phase and head_dim
CANDIDATES: dict[tuple[str, int], list[tuple[int, int, int, int]]] = {
    ("forward", 64): [(128, 64, 4, 3), (128, 64, 4, 4), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 8, 3)],
    ("forward", 128): [(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 8, 4), (128, 32, 4, 4)],
    ("forward", 256): [(128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 4)],
    ("dkdv", 64): [(64, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 3), (32, 64, 4, 4), (32, 128, 4, 3)],
    ("dkdv", 128): [(32, 64, 4, 3), (64, 128, 8, 2), (32, 64, 4, 2), (64, 128, 8, 3), (32, 128, 8, 3)],
    ("dkdv", 256): [(32, 64, 8, 2), (16, 64, 8, 2), (32, 64, 8, 3), (32, 32, 8, 2)],
    ("dq", 64): [(64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 4), (64, 64, 4, 2)],
    ("dq", 128): [(128, 64, 8, 3), (64, 64, 4, 2), (128, 32, 8, 3), (64, 32, 4, 3)],
    ("dq", 256): [(128, 32, 8, 2), (128, 64, 8, 1), (64, 32, 4, 3)],
}


def inputs(
    head_dim: int, seqlen: int, mask: Mask, tokens: int = 16384, width: int = 2048
) -> tuple[tuple[Tensor, ...], Call]:
    """(q, k, v, dout, lse, delta) of random normal bf16 data, batch * seqlen = tokens, heads * head_dim = width."""
    shape = (max(1, tokens // seqlen), seqlen, width // head_dim, head_dim)
    q, k, v, dout = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(4))
    call = Call(mask=mask, softmax_scale=head_dim**-0.5, max_seqlen_q=seqlen, max_seqlen_k=seqlen)
    out, lse = launch.forward(q, k, v, call)
    delta = (out.float() * dout.float()).sum(-1).transpose(1, 2).contiguous()
    return (q, k, v, dout, lse, delta), call


def runner(phase: str, saved: tuple[Tensor, ...], call: Call) -> Callable[[], Tensor]:
    """The kernel of a phase as a function without arguments that returns its first result."""
    sizes = launch.Sizes.of(saved[0], saved[1], saved[2], call)
    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: launch.forward(saved[0], saved[1], saved[2], call)[0],
        "dkdv": lambda: launch._dkdv(saved, sizes, call)[0],
        "dq": lambda: launch._dq(saved, sizes, call)[0],
    }
    return runs[phase]


def median_ms(run: Callable[[], Any], budget_ms: float = 30.0) -> float:
    """Median time of a call on the GPU; the host's part of a launch is not in it."""
    work = Work(lambda _: run())
    clock = CudaClock()
    run()
    torch.cuda.synchronize()
    time.sleep(0.02)  # without a rest the clock falls under the power limit and later candidates lose
    first = statistics.median(clock.burst(work, 0, 3))
    return statistics.median(clock.burst(work, 0, max(5, min(40, int(budget_ms / first)))))


def _compile(task: tuple[str, int, tuple[int, int, int, int], str]) -> str | None:
    """Run one candidate once on a small input, in a process of its own, for its compilation only."""
    phase, head_dim, candidate, mask = task
    saved, call = inputs(head_dim, 1024, Causal() if mask == "causal" else Full(), tokens=1024, width=2 * head_dim)
    table.TABLE[phase, 2, head_dim] = {"plain": table.Tile(*candidate)}
    try:
        runner(phase, saved, call)()
    except (RuntimeError, launch.TritonError) as problem:  # a tile the GPU has no room for
        return f"{task}: {str(problem).splitlines()[-1][:100]}"
    return None


def sweep(phases: list[str], head_dims: list[int], seqlens: list[int], processes: int = 12) -> Iterator[dict[str, Any]]:
    """One record for each phase, head_dim, mask, length and candidate: median ms and TFLOP/s."""
    chosen = {key: list(value) for key, value in CANDIDATES.items() if key[0] in phases and key[1] in head_dims}
    tasks = [
        (phase, dim, one, mask) for (phase, dim), some in chosen.items() for one in some for mask in ("causal", "full")
    ]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for problem in pool.map(_compile, tasks):
            if problem:
                yield {"failed": problem}
    products = {"forward": 2, "dkdv": 4, "dq": 3}
    for (phase, dim), mask, seqlen in itertools.product(chosen, (Causal(), Full()), seqlens):
        saved, call = inputs(dim, seqlen, mask)
        pairs = seqlen * (seqlen + 1) / 2 if isinstance(mask, Causal) else seqlen * seqlen
        flops = products[phase] * 2 * saved[0].shape[0] * saved[0].shape[2] * pairs * dim
        first = None
        kept = table.TABLE[phase, 2, dim]
        for candidate in chosen[phase, dim]:
            table.TABLE[phase, 2, dim] = {"plain": table.Tile(*candidate)}
            record = {"phase": phase, "head_dim": dim, "mask": repr(mask), "seqlen": seqlen, "tile": candidate}
            try:
                run = runner(phase, saved, call)
                result = run().float()
                first = result if first is None else first
                ms = median_ms(run)
                error = ((result - first).norm() / first.norm()).item()
                yield {**record, "ms": ms, "tflops": flops / ms / 1e9, "difference": error}
            except (RuntimeError, launch.TritonError) as problem:
                yield {**record, "failed": str(problem).splitlines()[-1][:100]}
        table.TABLE[phase, 2, dim] = kept


def summary(records: list[dict[str, Any]]) -> list[str]:
    """For each phase and head_dim the candidates by geometric mean, best first, and each shape's best."""
    lines = []
    done = [record for record in records if "tflops" in record]
    for phase, dim in dict.fromkeys((record["phase"], record["head_dim"]) for record in done):
        own = [record for record in done if (record["phase"], record["head_dim"]) == (phase, dim)]
        shapes = list(dict.fromkeys((record["mask"], record["seqlen"]) for record in own))
        lines.append(f"{phase} {dim}: " + " ".join(f"{mask[:2]}{seqlen}" for mask, seqlen in shapes))
        rows = {}
        for tile in dict.fromkeys(tuple(record["tile"]) for record in own):
            values = [record["tflops"] for record in own if tuple(record["tile"]) == tile]
            rows[tile] = (math.exp(sum(map(math.log, values)) / len(values)), values)
        for tile, (mean, values) in sorted(rows.items(), key=lambda item: -item[1][0]):
            lines.append(f"  {tile!s:18} {mean:6.0f} | " + " ".join(f"{value:5.0f}" for value in values))
    return lines


if __name__ == "__main__":
    import sys

    arguments = dict(word.split("=") for word in sys.argv[1:])
    found = list(
        sweep(
            arguments.get("phases", "forward,dkdv,dq").split(","),
            [int(dim) for dim in arguments.get("dims", "64,128,256").split(",")],
            [int(n) for n in arguments.get("seqlens", "1024,4096,16384").split(",")],
        )
    )
    if "out" in arguments:
        with open(arguments["out"], "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in found)
    sys.stdout.write("\n".join(summary(found)) + "\n" + "\n".join(str(r) for r in found if "failed" in r) + "\n")
