"""`hasten.accelerate`: a transformers model whose attention is served by hasten, or a clear refusal.

Sets the model's attention implementation through its own method, after looking at the code of every
attention layer to see that it will be asked.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from hasten.errors import ArgumentError, ArgumentTypeError
from hasten.models import adapters
from hasten.models.interface import name_of, register

ModelT = TypeVar("ModelT", bound=nn.Module)

#: Architectures whose logits, gradients and tokens are tested against `eager`.
TESTED = (
    "Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3, GPT-2, GPT-NeoX, GPT-OSS, Phi, Phi-3, "
    "BERT, RoBERTa, Longformer, T5, BART, LED"
)


def accelerate(model: ModelT, *, implementation: str | None = None, global_capacity: int | None = None) -> ModelT:
    """Serve the attention of a transformers model by `hasten.attention`, in place; returns the model.

    Works for every model whose attention layers call transformers' `AttentionInterface`, and for Longformer and
    LED (see adapters/), alone or inside a wrapper (PEFT, FSDP); `attention_layers(model)` lists them. The same
    model, not a copy: weights, hooks and configuration stay, logits and gradients are those of `eager` to
    rounding, and what `save_pretrained` writes loads without hasten. implementation: forces one of hasten's, as in
    `hasten.attention`. global_capacity: of Longformer and LED, see `read_tokens`.

    Raises ArgumentTypeError for something else than a transformers model, and ArgumentError that names the
    architecture if one of its attention layers would not be reached; the model is then unchanged.
    """
    roots = _roots(model)
    if not roots:
        hint = "write hasten.attention(q, k, v, ...) in your own modules"
        raise ArgumentTypeError("model", "a transformers PreTrainedModel", type(model).__name__, hint)
    name = name_of(implementation)
    register()
    for root in roots:
        reached, missed = _look(root)
        if missed or not reached:
            _raise_missed(root, sorted({type(layer).__name__ for layer in missed.values()}))
    parts = [part for root in roots for part in root.modules() if isinstance(part, PreTrainedModel)]
    before = [(part, part.config._attn_implementation) for part in parts]
    for root in roots:
        set_implementation(root, name)
        deaf = [
            path
            for path, layer in attention_layers(root).items()
            if _implementation_of(layer) != name and not adapters.is_served(type(layer))
        ]
        if deaf:
            for part, old in before:
                _set_one(part, old)
            _raise_missed(root, deaf[:3])
    for root in roots:
        adapters.serve(root, implementation, global_capacity)
    return model


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that call transformers' `AttentionInterface` or are served by adapters/, by their names."""
    return _look(model)[0]


def _roots(model: nn.Module) -> list[Any]:
    """The outermost transformers models: the model itself, or those inside a wrapper."""
    if isinstance(model, PreTrainedModel):
        return [model]
    return [root for child in model.children() for root in _roots(child)]


def _look(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """(attention layers that call the interface, those that neither do nor contain or lie in one that does)."""
    layers = {name: layer for name, layer in model.named_modules() if not isinstance(layer, PreTrainedModel)}
    reached = {name: layer for name, layer in layers.items() if _is_reached(type(layer))}
    missed = {
        name: layer
        for name, layer in layers.items()
        if type(layer).__name__.endswith("Attention") and not type(layer).__module__.startswith("torch.")
        if not any(_is_inside(name, other) or _is_inside(other, name) for other in reached)
    }
    return reached, missed


def _is_inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _is_reached(kind: type) -> bool:
    return _calls_interface(kind) or (kind.__name__.endswith("Attention") and adapters.is_served(kind))


def _calls_interface(kind: type) -> bool:
    """True if a method of the class, or of its bases in transformers, names the registry of attention functions."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for method in vars(base).values():
            code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
            if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
                return True
    return False


def set_implementation(root: Any, name: str) -> None:
    """Have a transformers model attend by the function registered as `name`, in every model inside it too.

    The model's own method leaves out, in transformers 5.17, those whose configuration is a copy (T5).
    """
    for part in root.modules():
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation != name:
            _set_one(part, name)


def _set_one(part: Any, name: str) -> None:
    """Of one model; transformers would only warn where a layer of its own does not call the interface."""
    if adapters.has_adapter(type(part)):
        part.config._attn_implementation = name
    else:
        part.set_attn_implementation(name)


def _implementation_of(layer: nn.Module) -> str | None:
    return getattr(getattr(layer, "config", None), "_attn_implementation", None)


def _raise_missed(root: nn.Module, layers: list[str]) -> None:
    got = f"{type(root).__name__}, whose {', '.join(layers) or 'layers'} would not be reached"
    hint = f"use it as it is, or one of those tested: {TESTED}"
    raise ArgumentError("model", "an architecture that calls transformers' AttentionInterface", got, hint)
