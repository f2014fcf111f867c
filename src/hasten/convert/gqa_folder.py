"""A checkpoint folder with fewer key/value heads: load, convert, write, read back, check; whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from hasten.convert import source
from hasten.convert.gqa import convert, expect_possible, to_gqa, to_mha
from hasten.convert.heads import sites
from hasten.convert.report import FILE, Check, Report, expect_free, writing
from hasten.errors import ArgumentError, CheckpointError

CROP, MAX_CROPS = 512, 64
CHECK_TOKENS = (2, 24)
#: largest difference of logits, relative to the largest logit, that rounding may make
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def convert_folder(
    path: str | Path,
    out: str | Path,
    num_kv_heads: int | Sequence[int],
    *,
    method: str = "mean",
    groups: str = "contiguous",
    calibration: Iterable[str | Path] = (),
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Convert a local checkpoint into another folder; returns the report, which is also written there.

    num_kv_heads, method, groups, seed: as in `hasten.convert.to_gqa`. calibration: text files. The written model is
    loaded again and checked before the folder gets its name; after an error or an interruption there is none.
    progress is told each stage before it begins.

    Raises ArgumentError, or CheckpointError if the source is incomplete, the disk full, or a check fails.
    """
    expect_free(out, overwrite=overwrite)
    expect_possible(source.load_shapes(path), num_kv_heads, method=method, groups=groups)  # before gigabytes are read
    progress("loading the checkpoint")
    tokenizer, model = source.load_tokenizer(path), source.load_model(path)
    files = list(calibration)
    crops = read_crops(files, tokenizer) if files else None
    progress(f"converting by {method}")
    converted, report = convert(model, num_kv_heads, method=method, groups=groups, calibration=crops, seed=seed)
    del model
    with writing(out, overwrite=overwrite) as folder:
        progress("writing")
        try:
            converted.save_pretrained(folder)  # with the code of a carried class
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(out, f"cannot be written: {error}", "make room, or choose another disk") from error
        progress("loading what was written, and checking it")
        kind = type(converted)
        del converted
        report.checks += self_checks(kind.from_pretrained(folder, local_files_only=True, dtype="auto").eval())
        report.expect_passed()
        (folder / FILE).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    return report


def read_crops(files: list[str | Path], tokenizer: Any) -> list[Tensor]:
    """Text files as token ids, (1, at most CROP) each, evenly from all of them, at most MAX_CROPS.

    Raises ArgumentError for a file that cannot be read, is empty or is no UTF-8 text, or without a tokenizer.
    """
    if tokenizer is None:
        hint = "save it beside the model, or leave calibration out"
        raise ArgumentError("calibration", "a checkpoint with a tokenizer", "one without", hint)
    crops: list[Tensor] = []
    for file in files:
        try:
            text = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError("calibration", "a text file in UTF-8", str(file), str(error)) from error
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].long()
        if not text.strip() or ids.numel() == 0:
            raise ArgumentError("calibration", "a file with text", f"{file}, which is empty", "leave it out")
        crops += list(ids.split(CROP, dim=1))
    step = max(1, len(crops) // MAX_CROPS)
    return crops[::step][:MAX_CROPS]


@torch.no_grad()
def self_checks(model: Any) -> list[Check]:
    """What theory says of a converted model, seen on random tokens; differences relative to the largest logit.

    Expanded to a head for every query head it computes the same; the strided grouping would not, so the check is
    able to fail; and the mean of the expanded model's equal heads is the model again.
    """
    noise = ROUNDING[model.dtype]
    given = _tokens(model.config)
    logits = model(**given).logits.double()

    def distance(other: Any) -> float:
        return float((other(**given).logits.double() - logits).abs().max() / logits.abs().max().clamp(min=1e-30))

    expanded = to_mha(model)
    found = [Check("expanded to multi-head, logits", distance(expanded), noise)]
    layers = sites(model)
    is_regular = not getattr(model.config, "kv_index", None)
    if is_regular:
        counts = {site.layer: site.num_kv_heads for site in layers}
        if any(count < layers[0].num_heads for count in counts.values()):
            again = to_gqa(expanded, [counts[layer] for layer in sorted(counts)])
            found.append(Check("mean of equal heads, logits", distance(again), noise))
            del again
    del expanded
    if any(1 < site.num_kv_heads < site.num_heads for site in layers):
        strided = distance(to_mha(model, is_strided=True))
        share = found[0].difference / strided if strided > 0 else float("nan")
        found.append(Check(f"share of that in what a strided grouping makes ({strided:.1e})", share, 0.5))
    return found


def _tokens(config: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, CHECK_TOKENS, generator=generator)
    return {"input_ids": ids, **({"decoder_input_ids": ids.flip(1)} if config.is_encoder_decoder else {})}
