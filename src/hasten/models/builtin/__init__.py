"""The model that ships inside the package: a small Llama, trained on Python source, in Hugging Face format.

`hasten generate` without a MODEL uses it. This module only says where its files are; how they were made
is told by `training.json` beside them and by `scripts/train_builtin.py`.
"""

from __future__ import annotations

from pathlib import Path

from hasten.errors import CheckpointError

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def path(directory: Path | None = None) -> Path:
    """The folder to give to `from_pretrained`; `directory` stands in for the package's own.

    Raises `CheckpointError` if a file is missing, as in an incomplete installation.
    """
    folder = directory or Path(__file__).parent
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        problem = f"the built-in model is incomplete: {', '.join(missing)} missing"
        raise CheckpointError(folder, problem, "reinstall hasten, or make the files with scripts/train_builtin.py")
    return folder
