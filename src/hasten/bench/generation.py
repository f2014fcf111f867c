"""The generation suite: a batch of prompts continued by `hasten.Engine` and by transformers' own `generate`.

Models come from a folder or, with random weights, from a named shape; nothing is downloaded. A step's time is what new
tokens add to a run: that of a whole run less that of a run of one new token, so prompts are in neither. Wall clock,
host included.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from hasten.bench import records, tables
from hasten.bench.decode import measure_read
from hasten.bench.problems import dtype_name
from hasten.bench.records import Record
from hasten.bench.timing import clock_for
from hasten.cache.paged import layers_of
from hasten.engine import Engine, Sampling
from hasten.engine.checkpoint import load
from hasten.errors import ArgumentError, HastenError

_LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 500000.0}
_QWEN = {"vocab_size": 151936, "num_key_value_heads": 8, "max_position_embeddings": 40960, "rope_theta": 1e6}
_TINY = {"vocab_size": 512, "num_key_value_heads": 2, "max_position_embeddings": 512}


def _sizes(hidden: int, between: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {"hidden_size": hidden, "intermediate_size": between, "num_hidden_layers": layers,
            "num_attention_heads": heads, "bos_token_id": None, "eos_token_id": None, **others}  # fmt: skip


#: name -> configuration, as published
SHAPES: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama-3.1-8b": lambda: transformers.LlamaConfig(**_LLAMA, **_sizes(4096, 14336, 32, 32)),
    "llama-1b": lambda: transformers.LlamaConfig(
        **_LLAMA, **_sizes(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True)
    ),
    "qwen3-0.6b": lambda: transformers.Qwen3Config(
        **_QWEN, **_sizes(1024, 3072, 28, 16, head_dim=128, tie_word_embeddings=True)
    ),
    "tiny": lambda: transformers.LlamaConfig(**_TINY, **_sizes(64, 128, 2, 4)),
}
#: what the engine is asked for; "hasten" is the engine as it comes
ENGINES: dict[str, dict[str, Any]] = {
    "hasten": {},
    "hasten-unmerged": {"merge_projections": False},
    "hasten-eager": {"cuda_graphs": False, "merge_projections": False},
    "hasten-compile": {"compile": True},
}
#: what `generate` of transformers is asked for
PEERS: dict[str, dict[str, Any]] = {"transformers": {}, "transformers-static": {"cache_implementation": "static"}}
VARIANTS = (*PEERS, *ENGINES)
#: those that are measured when nothing is said
USUAL = tuple(name for name in VARIANTS if name != "hasten-compile")
_LEAST_AGREEMENT = 0.5  # of first new tokens: a wrong model gives about none, rounding among random logits most


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure: a model in every (batch, prompt, new tokens), by every variant. model: a shape or a folder."""

    model: str
    sizes: Sequence[tuple[int, int, int]]
    variants: Sequence[str]
    dtype: torch.dtype
    device: torch.device
    kv_dtype: str | None = None
    repeats: int = 3
    commit: str | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown:
            raise ArgumentError("variants", f"some of {', '.join(VARIANTS)}", unknown[0], "separate by commas")
        if any(new < 2 for _, _, new in self.sizes):
            raise ArgumentError("new", "at least 2 tokens", 1, "a step's time is what the second and later ones add")


@dataclass(frozen=True)
class Traffic:
    """Bytes that a decode step must read: of weights, and of K and V of one sequence of `context` tokens."""

    weights: int
    kv: int

    @classmethod
    def of(cls, model: Any, context: int, itemsize: int) -> Traffic:
        """Every weight once, but the table of input embeddings where it is not the output's too; K and V once."""
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        weights = sum(weight.nbytes for weight in model.parameters())
        weights -= 0 if embedding is head else embedding.nbytes
        kv = 0
        for kind in layers_of(model):
            tokens = context if kind.window is None else min(context, kind.window + 1)
            kv += tokens * kind.num_kv_heads * (kind.head_dim + kind.head_dim_v) * itemsize
        return cls(weights, kv)


def run(options: Options, emit: Callable[[list[Record]], None], tell: Callable[[str], None]) -> None:
    """Measure all; `emit` gets each record when it is made, `tell` a line of progress."""
    place = records.environment(options.device, options.commit) | {"transformers": transformers.__version__}
    read_gbps = measure_read(options.device)
    place["read_gbps"] = float(f"{read_gbps:.4g}")
    tell(f"{place['device']}: reads {read_gbps:.0f} GB/s")
    model = build(options.model, options.dtype, options.device)
    for batch, prompt, new in options.sizes:
        ids = _prompts(model, batch, prompt)
        truth: Tensor | None = None
        for name in options.variants:
            record, tokens = measure_variant(name, model, ids, new, options, read_gbps)
            truth = tokens if truth is None else truth
            if truth is not None and tokens is not None:
                record |= _agreement(tokens, truth)
            emit([{"kind": "generation", **place, **record}])
            tell(f"{options.model} {batch}x{prompt}+{new} {name}: {_told(record)}")


def build(model: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A model in evaluation mode that ends no text: of a shape with random weights, or from a folder."""
    if model in SHAPES:
        torch.manual_seed(0)
        with torch.device(device):
            made = transformers.AutoModelForCausalLM.from_config(SHAPES[model](), dtype=dtype)
    else:
        made = load(model, device=str(device), dtype=str(dtype).removeprefix("torch.")).model
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 0
    return made.eval()


def measure_variant(
    name: str, model: Any, ids: Tensor, new: int, options: Options, read_gbps: float
) -> tuple[Record, Tensor | None]:
    """The record of one variant without the place, and its new tokens int64 (batch, new) if it ran."""
    batch, prompt = ids.shape
    record: Record = {"model": options.model, "batch": batch, "prompt": prompt, "new": new}
    record |= {"dtype": dtype_name(options.dtype), "implementation": name}
    record |= {"kv_dtype": options.kv_dtype if name in ENGINES else None}
    if options.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(options.device)
    try:
        if name in PEERS:
            found = _of_transformers(model, ids, new, options, PEERS[name])
        else:
            found = _of_engine(model, ids, new, options, ENGINES[name])
    except torch.OutOfMemoryError:
        return record | {"status": "out of memory"}, None
    except (RuntimeError, TypeError, ValueError, HastenError) as error:  # of a peer too: a result of the comparison
        return record | {"status": "failed", "reason": " ".join(str(error).split())[:300]}, None
    finally:
        torch.compiler.reset()
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    if not statistics.median(found.whole_s) > statistics.median(found.one_s):
        return record | {"status": "too short to time"}, found.tokens
    itemsize = 1 if record["kv_dtype"] else options.dtype.itemsize
    traffic = Traffic.of(model, prompt + new // 2, itemsize)
    return record | {"status": "ok", **_figures(found, batch, new, traffic, read_gbps, options)}, found.tokens


@dataclass(frozen=True)
class Found:
    """Seconds of runs of all new tokens, and of one; the tokens of the last; what else there is to say."""

    whole_s: Sequence[float]
    one_s: Sequence[float]
    tokens: Tensor
    others: Record


def _timed(generate: Callable[[int], Any], new: int, options: Options) -> tuple[list[float], list[float]]:
    """Seconds of `generate(new)` and of `generate(1)`, in turns, after one of each to warm up."""
    clock = clock_for(options.device)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(options.repeats + 1):
        for count, kept in zip((new, 1), times, strict=True):
            seconds = clock.wall_s(lambda count=count: generate(count))  # type: ignore[misc]
            if number > 0:
                kept.append(seconds)
    return times


def _of_transformers(model: Any, ids: Tensor, new: int, options: Options, asked: dict[str, Any]) -> Found:
    last: list[Tensor] = []
    mask = torch.ones_like(ids)

    def generate(count: int) -> None:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, **asked)
        last[:] = [*last[-1:], out[:, ids.shape[1] :]]

    whole, one = _timed(generate, new, options)
    return Found(whole, one, last[0], {})


def _of_engine(model: Any, ids: Tensor, new: int, options: Options, asked: dict[str, Any]) -> Found:
    batch, prompt = ids.shape
    prompts: list[list[int]] = ids.tolist()
    last: list[list[Any]] = []
    num_pages = batch * (-(-(prompt + new) // 16) + 1)
    sizes: dict[str, Any] = {"num_pages": num_pages, "max_running": batch, "max_batch_tokens": max(2048, batch)}
    with Engine(model, kv_dtype=options.kv_dtype, **sizes, **asked) as engine:

        def generate(count: int) -> None:
            made = engine.generate(prompts, Sampling(max_tokens=count))
            last[:] = [*last[-1:], made]

        whole, one = _timed(generate, new, options)
        stats = engine.stats()
    tokens = torch.tensor([record.token_ids for record in last[0]])
    others = {"num_graphs": stats.num_graphs, "num_replays": stats.num_replays, "no_graphs": stats.no_graphs}
    return Found(whole, one, tokens.to(ids.device), others)


def _figures(found: Found, batch: int, new: int, traffic: Traffic, read_gbps: float, options: Options) -> Record:
    whole, one = statistics.median(found.whole_s), statistics.median(found.one_s)
    step_s = (whole - one) / (new - 1)
    bytes_step = traffic.weights + batch * traffic.kv
    is_cuda = options.device.type == "cuda"
    return {
        "total_s": float(f"{whole:.5g}"),
        "first_s": float(f"{one:.5g}"),
        "ms_per_step": float(f"{step_s * 1e3:.5g}"),
        "decode_tokens_per_s": round(batch / step_s, 1),
        "tokens_per_s": round(batch * new / whole, 1),
        "n": len(found.whole_s),
        "weight_gb": float(f"{traffic.weights / 1e9:.4g}"),
        "kv_gb": float(f"{batch * traffic.kv / 1e9:.4g}"),
        "share_of_read": round(bytes_step / step_s / 1e9 / read_gbps, 4),
        "peak_gb": round(torch.cuda.max_memory_allocated(options.device) / 1e9, 2) if is_cuda else None,
        **found.others,
    }


def _prompts(model: Any, batch: int, prompt: int) -> Tensor:
    """Random tokens int64 (batch, prompt), no two rows alike."""
    vocab = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab, (batch, prompt), generator=generator).to(model.device)


def _agreement(tokens: Tensor, truth: Tensor) -> Record:
    """How many first new tokens, and how many of all, are those of the variant that ran first."""
    first, every = (
        float((one == other).float().mean()) for one, other in ((tokens[:, 0], truth[:, 0]), (tokens, truth))
    )
    found: Record = {"first_tokens_equal": round(first, 4), "tokens_equal": round(every, 4)}
    return found if first >= _LEAST_AGREEMENT else found | {"status": "wrong"}


def table(some: Sequence[Record]) -> str:
    """The records as one Markdown table: ms a step, tokens/s of decoding, share of the read bandwidth."""
    return tables.markdown("batch x prompt + new", some, _case, _told)


def _case(record: Record) -> str:
    return f"{record['model']} {record['batch']}x{record['prompt']}+{record['new']}"


def _told(record: Record) -> str:
    if record["status"] != "ok":
        return str(record["status"]) + (f": {record['reason']}" if "reason" in record else "")
    rate = f"{record['decode_tokens_per_s']:,.0f} tokens/s"
    return f"{record['ms_per_step']:.4g} ms, {rate} ({record['share_of_read']:.0%})"
