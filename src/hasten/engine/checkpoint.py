"""Loading a local Hugging Face checkpoint: its weights from safetensors, its model, its tokenizer.

Nothing is downloaded and no code of the checkpoint is run. Every way in which it can be incomplete is a
`CheckpointError`. Called by the command line; knows no request.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from hasten.errors import ArgumentError, CheckpointError
from hasten.models import accelerate

DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_WIDENED_BYTES = 2 * 2**30
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_FORMATS = "model.safetensors, or model.safetensors.index.json with its parts"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint: `model` in evaluation mode on its device, and its `tokenizer`.

    num_bytes: of weights on disk. attention: "hasten", or why the model keeps its own.
    """

    model: Any
    tokenizer: Any
    path: Path
    num_bytes: int
    attention: str


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    allow_pickle: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Checkpoint:
    """Load a checkpoint from a local folder.

    device: "auto" is a GPU if there is one. dtype: "auto" is the checkpoint's own on a GPU; on a CPU float32 as
    long as the weights then take at most 2 GiB, so that tokens do not hang on how a half-precision sum was
    rounded. allow_pickle: read pytorch_model.bin, which can run code, if there are no safetensors. progress is
    told each stage before it begins.

    Raises CheckpointError for a folder that is missing, incomplete, truncated or of an architecture that does
    not generate, and ArgumentError for a device or dtype that cannot be had.
    """
    folder = Path(path).expanduser()
    place = _device(device)
    progress("checking the checkpoint")
    config = _config(folder)
    files = _weight_files(folder, allow_pickle)
    num_bytes = sum(file.stat().st_size for file in files)
    wanted = _dtype(dtype, place, _count_parameters(folder, files))
    progress(f"loading {num_bytes / 2**20:,.1f} MiB of weights")
    model = _model(folder, config, wanted, files)
    progress("loading the tokenizer")
    tokenizer = _tokenizer(folder)
    model, attention = model.to(place).eval(), "hasten"
    try:
        accelerate(model)
    except ArgumentError as error:  # its attention layers cannot be reached; the model works all the same
        attention = str(error)
    return Checkpoint(model=model, tokenizer=tokenizer, path=folder, num_bytes=num_bytes, attention=attention)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # an unknown name; a build of torch without that device
        raise ArgumentError("device", "a device of this machine", repr(name), f"try cpu ({error})") from error
    return place


def _dtype(name: str, device: torch.device, num_parameters: int) -> torch.dtype | str:
    if name not in DTYPES:
        raise ArgumentError("dtype", f"one of {', '.join(DTYPES)}", repr(name), "auto chooses")
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    is_small = 0 < 4 * num_parameters <= MAX_WIDENED_BYTES
    return torch.float32 if device.type == "cpu" and is_small else "auto"


def _config(folder: Path) -> Any:
    if not folder.is_dir():
        problem = "no such folder" if not folder.exists() else "not a folder"
        raise CheckpointError(folder, problem, "give a local Hugging Face checkpoint; nothing is downloaded")
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(folder, "config.json is missing", "give the folder that save_pretrained wrote")
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        name = _model_type(file)
        if name is not None and name not in transformers.CONFIG_MAPPING:
            problem, hint = (
                f"unknown architecture {name!r}",
                "transformers must know it; a checkpoint's code is not run",
            )
        else:
            problem, hint = f"config.json cannot be read: {_first_line(error)}", "save the checkpoint again"
        raise CheckpointError(folder, problem, hint) from error
    heads = written.get("architectures") or []
    if heads and not any(str(head).endswith(_HEADS) for head in heads):
        hint = "generation needs a language-modelling head (…ForCausalLM, …ForConditionalGeneration)"
        raise CheckpointError(folder, f"{', '.join(heads)} does not generate text", hint)
    return config


def _model_type(config_file: Path) -> str | None:
    try:
        written = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None
    name = written.get("model_type") if isinstance(written, dict) else None
    return name if isinstance(name, str) else None


def _weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The files that hold the weights, each seen to be whole if it is safetensors."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        files = _parts(folder, index)
    elif pickles := sorted(folder.glob("pytorch_model*.bin")):
        if allow_pickle:
            return pickles
        problem = f"its weights are a pickle ({pickles[0].name}), which can run code"
        raise CheckpointError(folder, problem, "convert it to safetensors, or pass --allow-pickle if you trust it")
    else:
        raise CheckpointError(folder, "no weights", f"expected {_FORMATS}")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(file, f"truncated or damaged: {_first_line(error)}", "copy it again") from error
    return files


def _parts(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(index, f"cannot be read: {_first_line(error)}", "copy it again") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        problem = f"{len(missing)} of {len(names)} parts are missing, the first is {missing[0] if missing else 'any'}"
        raise CheckpointError(folder, problem, "copy the whole folder")
    return [folder / name for name in names]


def _count_parameters(folder: Path, files: list[Path]) -> int:
    """How many numbers the weights are; 0 if only a pickle would tell, or if they are quantised."""
    count = 0
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        return 0
    for file in files:
        if file.suffix != ".safetensors":
            return 0
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safe_open is no dict)
                count += torch.Size(tensors.get_slice(name).get_shape()).numel()
    return count


def _model(folder: Path, config: Any, dtype: torch.dtype | str, files: list[Path]) -> Any:
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    is_safe = all(file.suffix == ".safetensors" for file in files)
    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": is_safe}
    try:
        model, report = kind.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, weights_only=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        hint = "are these the weights and the architecture of its config.json?"
        raise CheckpointError(folder, f"cannot be loaded: {_first_line(error)}", hint) from error
    missing = sorted(report["missing_keys"])
    if missing:
        problem = f"{len(missing)} weights of {type(model).__name__} are missing, the first is {missing[0]}"
        raise CheckpointError(folder, problem, "the weights belong to another architecture, or a part is lost")
    return model


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        hint = "save the tokenizer there too: tokenizer.save_pretrained(folder)"
        raise CheckpointError(folder, "no tokenizer", hint)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        hint = "save the tokenizer again, or install what its format needs"
        raise CheckpointError(folder, f"its tokenizer cannot be loaded: {_first_line(error)}", hint) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
