"""The prompt cache suite: time to the first token of a prompt whose beginning is known, and of one that is not.

Cold, with the prefix in the pages of the engine, and with it in files of a folder that a new engine opens. Reading goes
through the file cache of the system, which a restart of the process leaves and one of the machine does not. Wall clock.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from hasten.bench import records
from hasten.bench.records import Record
from hasten.cache import PromptCache
from hasten.engine import Engine, Finished, Sampling
from hasten.engine.checkpoint import load
from hasten.errors import ArgumentError, HastenError

TIERS = ("cold", "pages", "disk")


@dataclass(frozen=True, kw_only=True)
class Options:
    """model: a folder with a checkpoint. lengths: tokens of prompts; shares: how much of each is known, 0 to 1.

    folder: where files go, a temporary one if None. repeats: of each, after one to warm up.
    """

    model: str
    lengths: Sequence[int]
    shares: Sequence[float]
    device: torch.device
    folder: str | None = None
    repeats: int = 3
    commit: str | None = None


def run(options: Options, emit: Callable[[list[Record]], None], tell: Callable[[str], None]) -> None:
    """Measure all; `emit` gets each record when it is made, `tell` a line of progress.

    Raises ArgumentError for shares and lengths that are none, and where a hit did not happen.
    """
    for share in options.shares:
        if not 0 < share <= 1:
            raise ArgumentError("shares", "more than 0, at most 1", share, "1 is a prompt that is all known")
    place = records.environment(options.device, options.commit) | {"transformers": transformers.__version__}
    checkpoint = load(options.model, device=str(options.device))
    draw = random.Random(0)
    for length in options.lengths:
        for share in options.shares:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                for record in _measure(checkpoint.model, length, share, folder, options.repeats, draw):
                    made = {"kind": "prompt_cache", **place, "model": checkpoint.path.name, **record}
                    emit([made])
                    tell(f"{length:,} tokens, {share:.0%} known, {record['tier']}: {record['ttft_ms']:,.4g} ms")


def _measure(model: Any, length: int, share: float, folder: str, repeats: int, draw: random.Random) -> Iterator[Record]:
    """A record for each of `TIERS`."""
    vocab = model.get_input_embeddings().weight.shape[0]
    known = min(max(1, round(length * share)), length - 1)
    prefix = _tokens(draw, vocab, known)
    prompts = [prefix + _tokens(draw, vocab, length - known) for _ in range(repeats + 1)]
    others = [_tokens(draw, vocab, length) for _ in range(repeats + 1)]
    with _engine(model, length, None) as engine:
        cold = [_first_token(engine, one) for one in others]
    with _engine(model, length, PromptCache(folder, restore="always")) as engine:
        _first_token(engine, [*prefix, prefix[0]])
        pages = [_first_token(engine, one) for one in prompts]
    disk: list[Finished] = []
    for one in prompts:
        cache = PromptCache(folder, restore="always")
        with _engine(model, length, cache) as engine:
            # what earlier prompts left beside the prefix is of other tokens, or a new engine would find all of it
            disk.append(_first_token(engine, one[:known] + _tokens(draw, vocab, length - known)))
            speed = cache.tiers.bytes_per_s if cache.tiers is not None else None
        cache.close()
    cold_s = _median(cold)
    for tier, found in zip(TIERS, (cold, pages, disk), strict=True):
        least = 0 if tier == "cold" else known - 1
        if any(one.cached_tokens < least or (tier == "disk") != (one.restored_tokens > 0) for one in found):
            got = (
                f"{[one.cached_tokens for one in found]} of {known}, {[one.restored_tokens for one in found]} from disk"
            )
            raise ArgumentError("prompt cache", f"hits of {least} tokens, {tier}", got, "this is a bug; report it")
        seconds = _median(found)
        per_token = found[0].cache_bytes_per_token
        yield {
            "tier": tier,
            "length": length,
            "share": share,
            "cached_tokens": found[-1].cached_tokens,
            "restored_tokens": found[-1].restored_tokens,
            "ttft_ms": float(f"{seconds * 1e3:.4g}"),
            "times_cold": float(f"{cold_s / seconds:.4g}"),
            "repeats": repeats,
            "bytes_per_token": per_token,
            # reading pays above this: the bytes of a token, in the time that computing it takes
            "break_even_gbps": float(f"{per_token * length / cold_s / 1e9:.4g}"),
            "disk_gbps": None if tier != "disk" or speed is None else float(f"{speed / 1e9:.4g}"),
        }


def table(some: Sequence[Record]) -> str:
    """The records as a Markdown table, TTFT by tier, and the line from which reading pays."""
    rows: dict[tuple[int, float], dict[str, Record]] = {}
    for record in some:
        rows.setdefault((record["length"], record["share"]), {})[record["tier"]] = record
    lines = ["| tokens | known | cold | in pages | from disk | reading pays above | read |", "|---:|" + "---:|" * 6]
    for (length, share), row in rows.items():
        told = [f"{row[tier]['ttft_ms']:,.4g} ms" if tier in row else "—" for tier in TIERS]
        told = [told[0], *(f"{text} ({row[tier]['times_cold']:,.3g}×)" if tier in row else text
                           for text, tier in zip(told[1:], TIERS[1:], strict=True))]  # fmt: skip
        last = row.get("disk", {})
        rates = [f"{last[name]:.3g} GB/s" if last.get(name) else "—" for name in ("break_even_gbps", "disk_gbps")]
        lines.append(f"| {length:,} | {share:.0%} | " + " | ".join([*told, *rates]) + " |")
    return "\n".join(lines)


@contextmanager
def _engine(model: Any, length: int, cache: PromptCache | None) -> Iterator[Engine]:
    """An engine with room for a prompt and what it shares, whose first forwards are behind it."""
    with Engine(model, num_pages=6 * (length // 16 + 2), max_running=4, prompt_cache=cache) as engine:
        # 33 tokens of no use: a forward of a prompt and some of decoding
        records = engine.generate([[0] * 33], Sampling(max_tokens=2), salt="\0warm-up")
        _check(records[0])
        yield engine


def _first_token(engine: Engine, ids: list[int]) -> Finished:
    return _check(engine.generate([ids], Sampling(max_tokens=1))[0])


def _check(record: Any) -> Finished:
    if not isinstance(record, Finished):
        raise record.error if isinstance(record.error, HastenError) else HastenError(str(record.error))
    return record


def _median(found: Sequence[Finished]) -> float:
    return statistics.median(one.ttft_s for one in found[1:])


def _tokens(draw: random.Random, vocab: int, count: int) -> list[int]:
    return [draw.randrange(vocab) for _ in range(count)]


__all__ = ["TIERS", "Options", "run", "table"]
