"""A checkpoint folder as a Longformer or an LED: load, convert, write, read back, check; whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError

from hasten.convert import led, longformer, source
from hasten.convert.positions import expect_length
from hasten.convert.report import FILE, Report, expect_free, writing
from hasten.errors import ArgumentError, CheckpointError
from hasten.masks import from_longformer_window

KINDS: dict[str, ModuleType] = {"longformer": longformer, "led": led}


def convert_folder(
    kind: str,
    path: str | Path,
    out: str | Path,
    *,
    max_length: int,
    window: int | Sequence[int],
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Convert a local checkpoint into another folder; returns the report, which is also written there.

    kind: longformer or led; max_length, window: as in `to_longformer` and `to_led`. The written model is loaded again,
    by plain transformers, and checked before the folder gets its name; after an error or an interruption there is none.

    Raises ArgumentError, or CheckpointError if the source is incomplete, the disk full, or a check fails.
    """
    converter = KINDS[kind]
    expect_free(out, overwrite=overwrite)
    expect_length(max_length)
    for one in [window] if isinstance(window, int) else window:
        from_longformer_window(one)
    converter.expect_possible(source.load_config(path))  # before gigabytes are read
    progress("loading the checkpoint")
    tokenizer, model = source.load_tokenizer(path), source.load_model(path)
    progress("converting")
    converted, report = converter.convert(model, max_length=max_length, window=window)
    with writing(out, overwrite=overwrite) as folder:
        progress("writing")
        try:
            converted.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.model_max_length = max_length
                tokenizer.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(out, f"cannot be written: {error}", "make room, or choose another disk") from error
        progress("loading what was written, and checking it")
        report.checks += converter.self_checks(model, _load(type(converted), folder))
        report.expect_passed()
        (folder / FILE).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    return report


def _load(kind: Any, folder: Path) -> Any:
    """What was written, as plain transformers reads it; every tensor of the class must be there."""
    model, found = kind.from_pretrained(folder, local_files_only=True, dtype="auto", output_loading_info=True)
    if found["missing_keys"]:
        raise CheckpointError(folder, f"{sorted(found['missing_keys'])[0]} is missing", "please report this model")
    return model.eval()


def parse_windows(text: str) -> int | list[int]:
    """512, or one a layer: 32,64,128; raises ArgumentError for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ArgumentError("window", "a number, or one for each layer: 32,64,128", repr(text), "both sides together")
    numbers = [int(part) for part in parts]
    return numbers[0] if len(numbers) == 1 else numbers
