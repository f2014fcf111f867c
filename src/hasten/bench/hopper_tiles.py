"""Time tile shapes of the Hopper kernels on this GPU: the measurement behind `ops/hopper/table.py`.

Every candidate is compiled first, in parallel processes that fill Triton's cache; then those of a shape are timed in
turns, as the attention suite times peers, and compared with each other's results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from hasten.bench.attention import quicker
from hasten.bench.problems import Pattern, Problem
from hasten.bench.timing import Plan, Work, clock_for, measure
from hasten.ops.call import Call
from hasten.ops.hopper import backward_launch, launch, table
from hasten.ops.hopper.table import BACKWARD, D64, D64_TALL, D128, D256, BackwardTile, Tile

CANDIDATES: dict[tuple[str, int], Sequence[Tile | BackwardTile]] = {
    ("forward", 64): (D64, Tile(2, 128, 4, 2), D64_TALL, Tile(3, 128, 4, 2, 160, 32), Tile(2, 64, 4, 2)),
    ("forward", 128): (D128, Tile(2, 64, 4, 2)),
    ("forward", 256): (D256,),
    ("backward", 64): (BACKWARD[64, True, False], BackwardTile(64, 128, 2, 0), BackwardTile(64, 128, 2, 1)),
    ("backward", 128): (BackwardTile(64, 128, 2, 0), BackwardTile(64, 128, 2, 1)),
    ("backward", 256): (BACKWARD[256, True, False],),
}
# (kind of mask, pattern, length); dense ones of 16k tokens, the others of batch 1
SHAPES = [(kind, kind, seqlen) for kind in ("full", "causal") for seqlen in (1024, 4096, 16384)]
SHAPES += [("window", "window:511,0", 65536), ("list", "longformer:256,64", 16384), ("list", "blocks:10", 16384)]


def problem(pattern: str, seqlen: int, head_dim: int) -> Problem:
    """A width of 2048, or 16 heads for what is no dense mask."""
    is_dense = pattern in ("full", "causal")
    return Problem(
        batch=16384 // seqlen if is_dense else 1,
        seqlen=seqlen,
        num_heads=2048 // head_dim if is_dense else 16,
        num_kv_heads=2048 // head_dim if is_dense else 16,
        head_dim=head_dim,
        pattern=Pattern.parse(pattern),
        dtype=torch.bfloat16,
    )


def runners(phase: str, tiles: Sequence[Tile | BackwardTile], shape: Problem) -> list[Callable[[int], Tensor]]:
    """For each tile a call of the kernels of a phase; the result is out, or dq."""
    device = torch.device("cuda")
    q, k, v, dout = shape.tensors(device, 0)
    length = shape.seqlen
    scale = shape.head_dim**-0.5
    call = Call(mask=shape.mask(device), softmax_scale=scale, max_seqlen_q=length, max_seqlen_k=length)
    if phase == "forward":
        return [partial(_forward, tile, q, k, v, call) for tile in tiles]
    out, lse = launch.forward(q, k, v, call)
    return [partial(_backward, tile, (dout, None, q, k, v, out, lse, call)) for tile in tiles]


def _forward(tile: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, _number: int) -> Tensor:
    table.FORWARD.update(dict.fromkeys(table.FORWARD, ((0, tile),)))
    return launch.forward(q, k, v, call)[0]


def _backward(tile: Any, given: tuple[Any, ...], _number: int) -> Tensor:
    table.BACKWARD.update(dict.fromkeys(table.BACKWARD, tile))
    for cached in (backward_launch.plan_before, backward_launch.plan_main, backward_launch.plan_after):
        cached.cache_clear()  # the tile is no part of their key: a table has one for each call
    return backward_launch.backward(*given).dq


def _compile(task: tuple[str, int, Any, str]) -> str | None:
    """Run one candidate once on a small input, in a process of its own, for its compilation only."""
    phase, head_dim, tile, pattern = task
    try:
        runners(phase, [tile], problem(pattern, 1024, head_dim))[0](0)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - a tile the GPU has no room for is a result of the sweep
        return f"{task}: {str(error).splitlines()[-1][:100]}"
    return None


def sweep(phases: Sequence[str], head_dims: Sequence[int], processes: int = 12) -> Iterator[dict[str, Any]]:
    """One record for each phase, head_dim, shape and candidate: median ms, TFLOP/s, distance to the first's result."""
    chosen = {key: tiles for key, tiles in CANDIDATES.items() if key[0] in phases and key[1] in head_dims}
    patterns = dict.fromkeys(pattern for _, pattern, _ in SHAPES)
    tasks = [(*key, tile, pattern) for key, tiles in chosen.items() for tile in tiles for pattern in patterns]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from ({"failed": said} for said in pool.map(_compile, tasks) if said)
    for (phase, head_dim), tiles in chosen.items():
        for kind, pattern, seqlen in SHAPES:
            shape = problem(pattern, seqlen, head_dim)
            calls = runners(phase, tiles, shape)
            first = calls[0](0).float()
            differences = [((call(0).float() - first).norm() / first.norm()).item() for call in calls]
            works = {str(number): Work(call) for number, call in enumerate(calls)}
            timings = measure(clock_for(torch.device("cuda")), works, quicker(Plan()))
            for number, tile in enumerate(tiles):
                ms = timings[str(number)].median_ms
                yield {
                    "phase": phase,
                    "kind": kind,
                    **shape.fields(),
                    "tile": asdict(tile) if isinstance(tile, Tile) else tile._asdict(),
                    "ms": ms,
                    "tflops": shape.flops(phase) / ms / 1e9,
                    "difference": differences[number],
                }


def summary(records: Sequence[dict[str, Any]]) -> list[str]:
    """For each phase and head_dim a line of shapes, then one of TFLOP/s for each tile."""
    lines = []
    done = [record for record in records if "tflops" in record]
    for phase, head_dim in dict.fromkeys((record["phase"], record["head_dim"]) for record in done):
        own = [record for record in done if (record["phase"], record["head_dim"]) == (phase, head_dim)]
        shapes = dict.fromkeys(f"{record['mask']}@{record['seqlen']}" for record in own)
        lines.append(f"{phase} {head_dim}: " + " ".join(shapes))
        for tile in dict.fromkeys(str(tuple(record["tile"].values())) for record in own):
            values = [record["tflops"] for record in own if str(tuple(record["tile"].values())) == tile]
            lines.append(f"  {tile:24} " + " ".join(f"{value:.0f}" for value in values))
    return lines


if __name__ == "__main__":
    arguments = dict(word.split("=") for word in sys.argv[1:])
    found = list(
        sweep(
            arguments.get("phases", "forward,backward").split(","),
            [int(dim) for dim in arguments.get("dims", "64,128,256").split(",")],
        )
    )
    if "out" in arguments:
        with open(arguments["out"], "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in found)
    sys.stdout.write("\n".join([*summary(found), *(str(record) for record in found if "failed" in record)]) + "\n")
