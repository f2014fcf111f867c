"""Other people's window conventions, turned into ours in one place.

Ours: `Window(left, right)` counts keys on each side, both inclusive, the query's own position not counted.
"""

from __future__ import annotations

from hasten.errors import ArgumentError
from hasten.masks.algebra import Mask
from hasten.masks.bands import Window


def from_mistral_window(sliding_window: int) -> Mask:
    """Mistral, Gemma, Qwen `sliding_window` W: a causal window of W keys, the query's own among them."""
    _expect_positive("sliding_window", sliding_window)
    return Window(sliding_window - 1, 0)


def from_longformer_window(attention_window: int) -> Mask:
    """Hugging Face Longformer and LED `attention_window` w: w // 2 keys on each side, and the own."""
    _expect_positive("attention_window", attention_window)
    if attention_window % 2:
        raise ArgumentError("attention_window", "an even number", attention_window, "it counts both sides together")
    return Window(attention_window // 2, attention_window // 2)


def from_allenai_window(attention_window: int) -> Mask:
    """allenai/longformer `attention_window` w: w keys on each side (twice Hugging Face's), and the own."""
    _expect_positive("attention_window", attention_window)
    return Window(attention_window, attention_window)


def _expect_positive(argument: str, window: int) -> None:
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ArgumentError(argument, "an int >= 1", repr(window), "take it from the model's configuration")
