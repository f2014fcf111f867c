"""A Longformer layer, or a model of several, against length: ours, Hugging Face's, and full attention.

Forward and backward of the same weights and inputs, each variant in a process of its own on a CPU, so that its peak
of memory is its own. Called by `hasten bench longformer`.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hasten.bench import records
from hasten.bench.records import Record
from hasten.errors import ArgumentError

VARIANTS = ("hasten", "huggingface", "full")
_AGREE = 1e-3  # of sums over all outputs in float32; half precision gets 30 times as much


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is measured: `layers` 0 is one self-attention layer with its projections, else a model of so many layers.

    window: both sides together. num_global: tokens from the first on. Base size unless said otherwise.
    """

    seqlen: int
    window: int = 512
    num_global: int = 1
    batch: int = 1
    layers: int = 0
    hidden_size: int = 768
    num_heads: int = 12
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Options:
    """A run: every problem in every variant, `repeats` steps of each after one to warm up."""

    problems: list[Problem]
    variants: tuple[str, ...] = VARIANTS
    device: str = "cpu"
    repeats: int = 3
    commit: str | None = None


def run(options: Options, emit: Callable[[list[Record]], None], tell: Callable[[str], None]) -> None:
    """Measure everything; `emit` gets the records of each problem, `tell` a line before each measurement.

    Raises ArgumentError for an unknown variant, and RuntimeError if Hugging Face's outputs and ours disagree.
    """
    for name in options.variants:
        if name not in VARIANTS:
            raise ArgumentError("variants", f"some of {', '.join(VARIANTS)}", name, "separate them by commas")
    place = records.environment(torch.device(options.device), options.commit)
    for problem in options.problems:
        made: list[Record] = []
        for variant in options.variants:
            tell(f"{variant}: {problem.seqlen} tokens")
            measured = _apart(variant, problem, options)
            made.append({"kind": "longformer", "variant": variant, **asdict(problem), **measured, **place})
        _expect_equal(made, problem.dtype)
        emit(made)


def table(made: Iterable[Record]) -> str:
    """The records for people: one line each, and how ours stands to the others at the same length."""
    rows = list(made)
    lines = [f"{'tokens':>7} {'variant':12} {'forward':>10} {'backward':>10} {'CPU':>10} {'memory':>11}  ours is"]
    for row in rows:
        ours = next((r for r in rows if r["variant"] == "hasten" and r["seqlen"] == row["seqlen"]), None)
        beside = ""
        if row.get("error"):
            lines.append(f"{row['seqlen']:>7} {row['variant']:12} {row['error']}")
            continue
        if ours and ours is not row and not ours.get("error"):
            speed = _step_ms(row) / _step_ms(ours)
            beside = f"{speed:.1f} x as fast, in 1/{row['peak_mib'] / max(ours['peak_mib'], 1e-9):.1f} of the memory"
        lines.append(
            f"{row['seqlen']:>7} {row['variant']:12} {row['forward_ms']:>7,.0f} ms {row['backward_ms']:>7,.0f} ms "
            f"{row['cpu_ms'] or 0:>7,.0f} ms {row['peak_mib']:>7,.0f} MiB  {beside}"
        )
    return "\n".join(lines)


def _step_ms(row: Record) -> float:
    """What a step is compared by: on one thread the time of the CPU, which others on the machine do not change."""
    is_alone = row.get("threads") == 1 and row["cpu_ms"]
    return float(row["cpu_ms"] if is_alone else row["forward_ms"] + row["backward_ms"])


def _apart(variant: str, problem: Problem, options: Options) -> Record:
    """`measure` in a process of its own on a CPU; here on a GPU, which counts its memory itself."""
    if options.device != "cpu":
        return measure(variant, problem, options.device, options.repeats, 0)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        arguments = variant, problem, options.device, options.repeats, torch.get_num_threads()
        return pool.apply(measure, arguments)


def measure(variant: str, problem: Problem, device: str, repeats: int, num_threads: int) -> Record:
    """Medians of forward and backward, peak memory, and a sum over the outputs; or `error` if memory ran out.

    cpu_ms, on a CPU: of the whole step, all threads together; with one thread it holds nothing of what others do.
    """
    if num_threads:
        torch.set_num_threads(num_threads)
    place = torch.device(device)
    try:
        step = _step(variant, problem, place)
        small = replace(problem, seqlen=64, window=min(problem.window, 64))
        _step(variant, small, place)()  # loads libraries and starts threads, outside the count of memory
        before = _memory(place, is_peak=False)
        times = [step() for _ in range(repeats + 1)]
    except (torch.OutOfMemoryError, MemoryError):
        return {"error": "out of memory"}
    timed = times[1:] or times
    return {
        "forward_ms": float(f"{statistics.median(t[0] for t in timed):.5g}"),
        "backward_ms": float(f"{statistics.median(t[1] for t in timed):.5g}"),
        "cpu_ms": None if place.type == "cuda" else float(f"{statistics.median(t[2] for t in timed):.5g}"),
        "n": len(timed),
        "peak_mib": float(f"{(_memory(place, is_peak=True) - before) / 2**20:.5g}"),
        "digest": times[-1][3],
    }


def _step(variant: str, problem: Problem, place: torch.device) -> Callable[[], tuple[float, ...]]:
    """A function that runs forward and backward once: (ms of each, ms of the CPU, a sum over the outputs)."""
    dtype = getattr(torch, problem.dtype)
    torch.manual_seed(0)
    run = (_model if problem.layers else _layer)(variant, problem, place, dtype)

    def step() -> tuple[float, ...]:
        gc.collect()
        cpu = time.process_time()
        start = _now(place)
        out = run()
        middle = _now(place)
        out.backward(torch.ones_like(out))
        end = _now(place)
        cpu_ms = (time.process_time() - cpu) * 1e3
        with torch.no_grad():
            digest = float((out.double() * torch.arange(out.shape[1], device=place)[None, :, None].cos()).abs().sum())
        return middle - start, end - middle, cpu_ms, digest

    return step


def _layer(variant: str, problem: Problem, place: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """One self-attention layer; its input wants a gradient."""
    layer: Any
    config = _config(problem, 1)
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    from hasten.models import adapters

    layer = LongformerSelfAttention(config, 0).to(place, dtype).eval()
    if variant == "hasten":
        adapters.serve(layer, None, None)
    hidden = torch.randn(
        problem.batch, problem.seqlen, problem.hidden_size, device=place, dtype=dtype, requires_grad=True
    )
    if variant == "full":
        return lambda: _full(layer, hidden)
    is_global = (torch.arange(problem.seqlen, device=place) < problem.num_global).expand(problem.batch, -1)
    additive = is_global.to(dtype) * 1e4
    words = {"is_index_masked": additive < 0, "is_index_global_attn": is_global}
    return lambda: layer(hidden, additive, **words, is_global_attn=problem.num_global > 0)[0]


def _full(layer: Any, hidden: Tensor) -> Tensor:
    """Full attention with a layer's local projections, by PyTorch."""
    names = "query", "key", "value"
    heads = (getattr(layer, name)(hidden).unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for name in names)
    return nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def _model(variant: str, problem: Problem, place: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A Longformer of several layers, or a RoBERTa of the same size with PyTorch's attention."""
    import transformers

    from hasten.models import accelerate

    shape = {"input_ids": torch.randint(5, 1000, (problem.batch, problem.seqlen), device=place)}
    shape["attention_mask"] = torch.ones_like(shape["input_ids"])
    model: Any
    if variant == "full":
        sizes = _sizes(problem, problem.layers)
        model = transformers.RobertaModel(transformers.RobertaConfig(**sizes, attn_implementation="sdpa"))
    else:
        model = transformers.LongformerModel(_config(problem, problem.layers))
        is_global = (torch.arange(problem.seqlen, device=place) < problem.num_global).long()
        shape["global_attention_mask"] = is_global.expand(problem.batch, -1)
    model = model.to(place, dtype).eval()
    if variant == "hasten":
        accelerate(model)
    return lambda: model(**shape)[0]


def _sizes(problem: Problem, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": 1000,
        "hidden_size": problem.hidden_size,
        "num_attention_heads": problem.num_heads,
        "num_hidden_layers": layers,
        "intermediate_size": 4 * problem.hidden_size,
        "max_position_embeddings": problem.seqlen + problem.window + 2,
        "pad_token_id": 1,
    }


def _config(problem: Problem, layers: int) -> Any:
    from transformers import LongformerConfig  # seconds to import

    return LongformerConfig(
        **_sizes(problem, layers), attention_window=[problem.window] * layers, attention_probs_dropout_prob=0.0
    )


def _expect_equal(made: list[Record], dtype: str) -> None:
    sums = {row["variant"]: row["digest"] for row in made if "digest" in row}
    if {"hasten", "huggingface"} <= set(sums):
        allowed = _AGREE * (1 if dtype == "float32" else 30)
        if abs(sums["hasten"] - sums["huggingface"]) > allowed * abs(sums["huggingface"]):
            raise RuntimeError(f"outputs differ: {sums}")


def _now(place: torch.device) -> float:
    """Milliseconds, once the device is idle."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter() * 1e3


def _memory(place: torch.device, *, is_peak: bool) -> float:
    """Bytes: in use now, or at most since that was asked. A process only knows its largest size so far."""
    if place.type == "cuda":
        if is_peak:
            return float(torch.cuda.max_memory_allocated(place))
        torch.cuda.reset_peak_memory_stats(place)
        return float(torch.cuda.memory_allocated(place))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
