"""A checkpoint for a verb: transformers quiet, the built-in model where none is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hasten.engine import Checkpoint


def load(model: str | None, device: str, dtype: str, allow_pickle: bool, progress: Callable[[str], None]) -> Checkpoint:
    """Arguments as for `engine.load`; takes seconds, for the imports too."""
    import transformers

    from hasten import engine
    from hasten.models import builtin

    transformers.utils.logging.set_verbosity_error()  # what matters comes as an error of ours
    transformers.utils.logging.disable_progress_bar()
    path = builtin.path() if model is None else model
    return engine.load(path, device=device, dtype=dtype, allow_pickle=allow_pickle, progress=progress)
