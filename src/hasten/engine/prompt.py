"""The tokens of a prompt, and whether a model can take them. Called by `generate` before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hasten.engine.runner import context_length
from hasten.errors import ArgumentError


def encode(tokenizer: Any, prompt: str | Sequence[int], *, is_chat: bool = False) -> list[int]:
    """The token ids of a text (as a user's turn if `is_chat`), or of ids themselves.

    Raises ArgumentError for an empty prompt, and for a chat with a checkpoint that has no chat template.
    """
    if not isinstance(prompt, str):
        ids = [int(token) for token in prompt]
    elif not prompt:
        ids = []
    elif tokenizer is None:
        raise ArgumentError("prompt", "token ids, since there is no tokenizer", "a text", "pass a tokenizer")
    elif is_chat:
        if not getattr(tokenizer, "chat_template", None):
            hint = "leave the chat option out to continue the text as it is"
            raise ArgumentError("chat", "a checkpoint with a chat template", "one without", hint)
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ArgumentError("prompt", "at least one token", repr(prompt), "write something to continue")
    return list(ids)


def first_tokens(model: Any) -> list[int]:
    """What the decoder of an encoder-decoder model begins with; empty for a decoder-only model."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return []
    rules = getattr(model, "generation_config", None)
    for holder in (rules, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(getattr(holder, name, None), int):
                return [getattr(holder, name)]
    hint = "set it in the checkpoint's generation_config.json"
    raise ArgumentError("model", "a decoder_start_token_id", "none", hint)


def check(model: Any, prompt: Sequence[int]) -> int | None:
    """How many new tokens there is room for after this prompt, or None if the model sets no limit.

    Raises ArgumentError if the prompt leaves no room, or has tokens that the model does not know.
    """
    vocab = model.get_input_embeddings().weight.shape[0]
    strange = next((token for token in prompt if not 0 <= token < vocab), None)
    if strange is not None:
        hint = "the tokenizer and the model do not belong together"
        raise ArgumentError("prompt", f"token ids from 0 to {vocab - 1}", strange, hint)
    context = context_length(model.config)
    if context is None:
        return None
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    most = context if is_encoder_decoder else context - 1
    if len(prompt) > most:
        expected = f"at most {most} tokens, for a context of {context}"
        raise ArgumentError("prompt", expected, f"{len(prompt)} tokens", "shorten it, or use a model with more context")
    return context - (1 if is_encoder_decoder else len(prompt))
