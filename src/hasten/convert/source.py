"""Loading the checkpoint to convert: as it is, in its own dtype, on the CPU; or only its shapes.

Nothing is downloaded and no code of the checkpoint is run; carried classes are found because hasten has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from hasten.convert import carried
from hasten.errors import CheckpointError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def load_config(path: str | Path) -> Any:
    """The configuration of a local checkpoint; raises CheckpointError if there is none that can be read."""
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        problem = "config.json is missing" if folder.is_dir() else "no such folder"
        raise CheckpointError(folder, problem, "give a local Hugging Face checkpoint; nothing is downloaded")
    carried.register()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        hint = "transformers must know its architecture; a checkpoint's code is not run"
        raise CheckpointError(folder, f"config.json cannot be read: {_first_line(error)}", hint) from error
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(folder, "its weights are quantised", "convert the original, then quantise the result")
    return config


def load_shapes(path: str | Path) -> Any:
    """The model of a checkpoint on the meta device: every shape, no weights; dtype as stored."""
    config = load_config(path)
    with torch.device("meta"):
        model = _kind(config).from_config(config) if _is_auto(config) else _kind(config)(config)
    return model.to(getattr(config, "dtype", None) or torch.float32)


def load_model(path: str | Path) -> Any:
    """The model of a local checkpoint in evaluation mode, in its own dtype, on the CPU.

    Raises CheckpointError for weights that are missing, damaged, a pickle, or of another architecture.
    """
    folder, config = Path(path).expanduser(), load_config(path)
    if not any((folder / name).is_file() for name in _WEIGHTS):
        has_pickle = any(folder.glob("pytorch_model*.bin"))
        problem = "its weights are a pickle, which can run code" if has_pickle else "no weights"
        raise CheckpointError(folder, problem, "expected model.safetensors, or its index and parts")
    try:
        model, report = _kind(config).from_pretrained(
            folder, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        hint = "are these the weights and the architecture of its config.json?"
        raise CheckpointError(folder, f"cannot be loaded: {_first_line(error)}", hint) from error
    if report["missing_keys"]:
        first = sorted(report["missing_keys"])[0]
        problem = f"{len(report['missing_keys'])} weights of {type(model).__name__} are missing, the first is {first}"
        raise CheckpointError(folder, problem, "the weights belong to another architecture, or a part is lost")
    return model.eval()


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer beside a checkpoint, or None if there is none; raises CheckpointError if it cannot be read."""
    folder = Path(path).expanduser()
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        hint = "save the tokenizer again, or install what its format needs"
        raise CheckpointError(folder, f"its tokenizer cannot be loaded: {_first_line(error)}", hint) from error


def _name(config: Any) -> str:
    return str((config.architectures or [""])[0])


def _is_auto(config: Any) -> bool:
    return not hasattr(transformers, _name(config))


def _kind(config: Any) -> Any:
    """The class that the checkpoint names if transformers has it, else the Auto class for text."""
    is_both = config.is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if is_both else transformers.AutoModelForCausalLM
    return auto if _is_auto(config) else getattr(transformers, _name(config))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
