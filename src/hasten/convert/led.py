"""BART with Longformer attention in its encoder: `to_led` (arXiv 2004.05150, section 7).

Weights keep their values; encoder positions are repeated to the new length, and global projections start as copies of
the local ones. The decoder stays as it is. What LED of transformers cannot express is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from hasten.convert.positions import ROUNDING, expect_length, tile, windows_of
from hasten.convert.report import COPIED, DROPPED, KEPT, Check, Report
from hasten.errors import ArgumentError

_RESERVED = 2  # rows in front of BART's position tables that no token uses; LED's tables have none
_TARGETS = {
    "BartModel": "LEDModel",
    "BartForConditionalGeneration": "LEDForConditionalGeneration",
    "BartForQuestionAnswering": "LEDForQuestionAnswering",
}
_NORMALISED_BEFORE = ("mbart", "pegasus", "m2m_100", "blenderbot", "plbart")
_ATTENTION = {
    "self_attn.q_proj": "self_attn.longformer_self_attn.query",
    "self_attn.k_proj": "self_attn.longformer_self_attn.key",
    "self_attn.v_proj": "self_attn.longformer_self_attn.value",
    "self_attn.out_proj": "self_attn.output",
}
_SAME = (
    "vocab_size",
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_layers",
    "decoder_attention_heads",
    "decoder_ffn_dim",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "activation_function",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "init_std",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "id2label",
    "label2id",
    "dtype",
)


def to_led(model: Any, *, max_length: int = 16384, window: int | Sequence[int] = 1024) -> Any:
    """An LED of transformers with the weights of a BART; `model` is left as it is.

    max_length: tokens its encoder will take; the decoder's positions do not change. window: as LED counts it, both
    sides together, even; or one for each layer. Logits equal those of the source while a text has at most
    window / 2 + 1 tokens, or while all its tokens are global.

    Raises ArgumentError for another architecture (mBART and Pegasus normalise before each layer, LED after).
    """
    return convert(model, max_length=max_length, window=window)[0]


def convert(model: Any, *, max_length: int, window: int | Sequence[int]) -> tuple[Any, Report]:
    """`to_led`, and the report of every tensor."""
    expect_possible(model.config)
    source, scale = model.config, _scale(model.config)
    expect_length(max_length)
    report = Report(type(model).__name__, _TARGETS.get(type(model).__name__, "LEDModel"))
    config = transformers.LEDConfig(
        **{name: getattr(source, name) for name in _SAME},
        attention_window=windows_of(window, source.encoder_layers),
        max_encoder_position_embeddings=max_length,
        max_decoder_position_embeddings=source.max_position_embeddings,
        tie_word_embeddings=source.tie_word_embeddings and scale == 1.0,
    )
    target = getattr(transformers, report.target)(config)
    state = _state(model, config, scale, report)
    wanted = target.state_dict()
    for name in sorted(set(state) - set(wanted)):
        report.entries = [entry for entry in report.entries if entry.name != name]
        report.add(name, DROPPED, name, state.pop(name), "LED has no place for it")
    missing = sorted(set(wanted) - set(state))
    if missing:
        raise ArgumentError("MODEL", f"a tensor for {missing[0]}", "none", "its architecture is not the usual one")
    target.load_state_dict(state)
    target.tie_weights()
    if getattr(model, "generation_config", None) is not None and target.can_generate():
        target.generation_config = model.generation_config
    report.remarks.append("mark token 0 as global, in training too: LED without global tokens summarises badly")
    return target.to(model.dtype).eval(), report


def expect_possible(config: Any) -> None:
    """Raise ArgumentError unless LED can express the architecture."""
    kind = config.model_type
    if kind in _NORMALISED_BEFORE or getattr(config, "normalize_before", False):
        got = f"{kind}, whose layers normalise before they attend"
        hint = "LED normalises afterwards and no other class of transformers has Longformer attention"
        raise ArgumentError("MODEL", "bart", got, hint)
    if kind != "bart":
        raise ArgumentError("MODEL", "bart", kind, "encoders alone convert with hasten convert longformer")


def _scale(config: Any) -> float:
    """What the source multiplies its embeddings by; LED cannot, so they are stored multiplied and untied."""
    return float(config.d_model**0.5) if getattr(config, "scale_embedding", False) else 1.0


def _state(model: Any, config: Any, scale: float, report: Report) -> dict[str, Tensor]:
    """The tensors of the source under LED's names, copies included; all are written down."""
    state: dict[str, Tensor] = {}
    is_base = model.base_model is model
    for source, tensor in model.state_dict().items():
        inner = source.removeprefix("model.")
        name = source if inner == source and not is_base else inner if is_base else f"led.{inner}"
        if name.endswith("embed_positions.weight"):
            rows = tensor[_RESERVED:]
            if "encoder" in name:
                state[name] = tile(rows, config.max_encoder_position_embeddings)
                how = f"rows repeated from {len(rows)} to {config.max_encoder_position_embeddings}"
            else:
                state[name] = rows.clone()
                how = "as they were"
            report.add(name, COPIED, source, state[name], f"{how}, without the first {_RESERVED}, which LED has not")
            continue
        if name.endswith("embed_tokens.weight") and scale != 1.0:
            state[name] = tensor * scale
            report.add(name, COPIED, source, tensor, f"times {scale:.4g}, which LED does not do itself")
            continue
        place = ".encoder.layers." if not is_base else "encoder.layers."
        local = next((old for old in _ATTENTION if place in name and old in name), None)
        name = name if local is None else name.replace(local, _ATTENTION[local])
        state[name] = tensor
        report.add(name, KEPT, source, tensor)
        if local is not None and "out_proj" not in local:
            own, _, kind = name.rpartition(".")
            state[f"{own}_global.{kind}"] = tensor.clone()
            report.add(f"{own}_global.{kind}", COPIED, source, tensor, "starts as the local projection")
    return state


@torch.no_grad()
def self_checks(model: Any, converted: Any) -> list[Check]:
    """Where theory says equal: short texts, and texts whose tokens are all global; states after the decoder."""
    source, target = model.base_model, converted.base_model
    config, noise = target.config, ROUNDING[model.dtype]
    longest = min(model.config.max_position_embeddings, config.max_encoder_position_embeddings)
    short = min(min(config.attention_window) // 2 + 1, longest)
    found = []
    for words, seqlen, is_global in (
        (f"{short} tokens, the window reaches all", short, 0),
        (f"{min(longest, 2 * short + 1)} tokens, all global", min(longest, 2 * short + 1), 1),
    ):
        ids = torch.randint(3, config.vocab_size, (2, seqlen), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :8]}
        expected = source(**given)[0].double()
        got = target(**given, global_attention_mask=mask * is_global)[0].double()
        found.append(Check(words, float((got - expected).abs().max() / expected.abs().max()), noise))
    return found


__all__ = ["convert", "expect_possible", "self_checks", "to_led"]
