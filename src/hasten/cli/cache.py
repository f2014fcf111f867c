"""`hasten cache`: what a folder of prompt caches holds, whether it is whole, and what is kept there by name.

Lists go to stdout, talk to stderr. All work is in `hasten.cache`; a model is loaded only where texts are asked for.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten import config
from hasten.errors import ArgumentError

if TYPE_CHECKING:
    from hasten.cache.store import DiskStore, Entry

app = typer.Typer(no_args_is_help=True, help="Look into, check, prune and fill a folder of prompt caches.")

Folder = Annotated[Path | None, typer.Argument(metavar="PATH", help="The folder; by default HASTEN_CACHE/prompts.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line instead of a table.")]


@app.command("ls")
def list_pieces(path: Folder = None, as_json: AsJson = False) -> None:
    """Every piece, the last used first, and every pin."""
    store = _open(path)
    pins = {pin.last: pin.name for pin in store.pins()}
    for entry in store.entries():
        if as_json:
            print(json.dumps({**asdict(entry), "tokens": len(entry.tokens), "pin": pins.get(entry.key)}))
        else:
            print(_line(entry, pins))
    if not as_json:
        _tell(f"{len(store.entries()):,} pieces, {store.nbytes / 2**20:,.1f} MiB in {store.folder}")


@app.command()
def show(
    key: Annotated[str, typer.Argument(help="The beginning of a key, as ls prints it.")],
    path: Folder = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint, whose tokenizer makes text of tokens.")] = None,
) -> None:
    """What leads to a piece and what is behind it, as a tree, with its tokens or text."""
    store = _open(path)
    found = [entry for entry in store.entries() if entry.key.startswith(key)]
    if len(found) != 1:
        raise ArgumentError("key", "the beginning of one key", f"{key!r}, of {len(found)}", "see hasten cache ls")
    decode = _decoder(model)
    pins = {pin.last: pin.name for pin in store.pins()}
    every = {entry.key: entry for entry in store.entries()}
    before: list[Entry] = [found[0]]
    while before[0].parent in every:
        before.insert(0, every[before[0].parent])
    for depth, entry in enumerate(before):
        print("  " * depth + _line(entry, pins))
        print("  " * depth + "  " + decode(entry.tokens))
    behind = [entry for entry in every.values() if entry.parent == found[0].key]
    for entry in sorted(behind, key=lambda one: one.tokens):
        print("  " * len(before) + _line(entry, pins))


@app.command()
def verify(path: Folder = None) -> None:
    """Read every file and check it; what is damaged goes, and exit code 2 says that there was some."""
    store = _open(path)
    lost = len(store.problems)
    whole, _ = store.verify()
    print(f"{whole:,} pieces are whole, {len(store.problems):,} were not")
    for problem in store.problems[lost:]:
        _tell(problem)
    if store.problems:
        raise typer.Exit(2)


@app.command()
def prune(
    path: Folder = None,
    max_bytes: Annotated[int | None, typer.Option(min=0, help="Leave at most so many bytes.")] = None,
    ttl: Annotated[float | None, typer.Option(min=0, help="Part with what nobody used for so many seconds.")] = None,
) -> None:
    """Part with the least recently used; what is pinned stays."""
    if max_bytes is None and ttl is None:
        raise ArgumentError("--max-bytes", "a limit: --max-bytes or --ttl", "none", "--max-bytes 0 parts with all")
    store = _open(path)
    count = store.prune(max_bytes=max_bytes, ttl_s=ttl)
    print(f"{count:,} pieces went, {store.nbytes:,} bytes are left")


@app.command()
def pin(
    name: Annotated[str, typer.Argument(help="What it is called.")],
    prompt: Annotated[str, typer.Option(help="The text to keep; - reads it from stdin.")],
    path: Folder = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint; the built-in model if none.")] = None,
    ttl: Annotated[float | None, typer.Option(help="Keep it for so many seconds; for good if not given.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Compute a prefix with a model and keep it by a name."""
    from hasten import engine  # takes seconds: not for --help
    from hasten.cache import PromptCache
    from hasten.models import builtin

    text = sys.stdin.read() if prompt == "-" else prompt
    checkpoint = engine.load(builtin.path() if model is None else model, device=device, dtype=dtype, progress=_tell)
    cache = PromptCache.load(_folder(path), checkpoint.model, checkpoint.tokenizer)
    count = cache.pin(name, text, ttl=ttl)
    cache.close()
    for problem in cache.problems:
        _tell(problem)
    print(f"{count:,} tokens are kept as {name!r}")


def _folder(path: Path | None) -> Path:
    return config.cache_dir() / "prompts" if path is None else path


def _open(path: Path | None) -> DiskStore:
    from hasten.cache.store import DiskStore  # loads transformers

    folder = _folder(path)
    if not (folder / "index.sqlite").is_file():
        hint = "give the folder of a hasten.PromptCache"
        raise ArgumentError("path", "a folder of prompt caches", f"{folder}, which has no index.sqlite", hint)
    store = DiskStore(folder)
    for problem in store.problems:
        _tell(problem)
    return store


def _line(entry: Entry, pins: dict[str, str]) -> str:
    now = time.time()
    kept = f"  pinned as {pins[entry.key]!r}" if entry.key in pins else "  pinned" if entry.pinned_s > now else ""
    end = entry.start + len(entry.tokens)
    size, age = f"{entry.nbytes / 1024:,.0f} KiB", _age(now - entry.used_s)
    return f"{entry.key[:12]}  tokens {entry.start:,} to {end:,}  {size}  {entry.hits:,} hits  {age}{kept}"


def _age(seconds: float) -> str:
    for name, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.0f} {name} ago"
    return f"{max(0.0, seconds):,.0f} s ago"


def _decoder(model: str | None) -> Any:
    if model is None:
        return lambda tokens: " ".join(map(str, tokens[:24])) + (" …" if len(tokens) > 24 else "")
    import transformers  # only for texts

    tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    return lambda tokens: repr(tokenizer.decode(list(tokens)))


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


__all__ = ["app"]
