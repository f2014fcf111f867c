"""An encoder with full attention as a Longformer: `to_longformer`, for BERT, RoBERTa, XLM-R, DistilBERT and ELECTRA.

Weights keep their values; positions are repeated to the new length and global projections start as copies of the local
ones (arXiv 2004.05150, section 5). What is written in one place is how Longformer's names and positions differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from hasten.convert.positions import ROUNDING, expect_length, tile, windows_of
from hasten.convert.report import COPIED, DROPPED, KEPT, MADE, Check, Report
from hasten.errors import ArgumentError

_ATTENTION = "attention.self."
_MLM = {"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "decoder": "lm_head.decoder"}
_DISTILBERT = {
    "transformer.layer.": "encoder.layer.",
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}


@dataclass(frozen=True)
class _Shape:
    """How an encoder's names differ from Longformer's; `offset` is the first position row that a token uses."""

    prefix: str
    names: dict[str, str] = field(default_factory=dict)
    offset: int | None = 0  # None: pad_token_id + 1, as in Longformer


@dataclass(frozen=True)
class _Head:
    """A head that Longformer computes in the same way, and its names there."""

    target: str
    names: dict[str, str] = field(default_factory=dict)


_SHAPES = {
    "bert": _Shape("bert"),
    "electra": _Shape("electra"),
    "distilbert": _Shape("distilbert", _DISTILBERT),
    "roberta": _Shape("roberta", offset=None),
    "xlm-roberta": _Shape("roberta", offset=None),
    "camembert": _Shape("roberta", offset=None),
}
_BERT_MLM = {
    "cls.predictions.transform.dense": _MLM["dense"],
    "cls.predictions.transform.LayerNorm": _MLM["norm"],
    "cls.predictions.decoder": _MLM["decoder"],
    "cls.predictions.bias": "lm_head.bias",
}
_HEADS = {
    "BertForMaskedLM": _Head("LongformerForMaskedLM", _BERT_MLM),
    "BertForPreTraining": _Head("LongformerForMaskedLM", _BERT_MLM),
    "BertForSequenceClassification": _Head(
        "LongformerForSequenceClassification",
        {"bert.pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"},
    ),
    "DistilBertForMaskedLM": _Head(
        "LongformerForMaskedLM",
        {"vocab_transform": _MLM["dense"], "vocab_layer_norm": _MLM["norm"], "vocab_projector": _MLM["decoder"]},
    ),
    "ElectraForMaskedLM": _Head(
        "LongformerForMaskedLM",
        {
            "generator_predictions.dense": _MLM["dense"],
            "generator_predictions.LayerNorm": _MLM["norm"],
            "generator_lm_head": _MLM["decoder"],
        },
    ),
    **{
        f"{family}For{task}": _Head(f"LongformerFor{task}")
        for family in ("Roberta", "XLMRoberta", "Camembert")
        for task in ("MaskedLM", "SequenceClassification")
    },
    **{
        f"{family}For{task}": _Head(f"LongformerFor{task}")
        for family in ("Roberta", "XLMRoberta", "Camembert", "Bert", "DistilBert", "Electra")
        for task in ("TokenClassification", "QuestionAnswering")
    },
}


def to_longformer(model: Any, *, max_length: int = 4096, window: int | Sequence[int] = 512) -> Any:
    """A Longformer of transformers with the weights of an encoder; `model` is left as it is.

    model: BERT, RoBERTa, XLM-R, CamemBERT, DistilBERT or ELECTRA of transformers, with or without a head. max_length:
    tokens it will take. window: as Longformer counts it, both sides together, even; or one for each layer. Outputs
    equal those of the source while a text has at most window / 2 + 1 tokens, or while all its tokens are global.

    Raises ArgumentError for another architecture, or one of these that Longformer cannot express.
    """
    return convert(model, max_length=max_length, window=window)[0]


def convert(model: Any, *, max_length: int, window: int | Sequence[int]) -> tuple[Any, Report]:
    """`to_longformer`, and the report of every tensor."""
    shape = expect_possible(model.config)
    head = _head(model)
    config = _config(model.config, shape, max_length, window)
    target = getattr(transformers, "LongformerModel" if head is None else head.target)(config)
    report = Report(type(model).__name__, type(target).__name__)
    state = _state(model, shape, head, config, report)
    wanted = target.state_dict()
    for name in sorted(set(wanted) - set(state)):
        state[name] = _made(name, wanted[name], report)
    for name in sorted(set(state) - set(wanted)):
        report.entries = [entry for entry in report.entries if entry.name != name]
        report.add(name, DROPPED, name, state.pop(name), "Longformer has no place for it")
    target.load_state_dict(state)
    target.tie_weights()
    _remark(model, shape, head, report)
    return target.to(model.dtype).eval(), report


def _head(model: Any) -> _Head | None:
    """The equal head in Longformer, if there is one: its masked language model knows no other activation than gelu."""
    head, config = _HEADS.get(type(model).__name__), model.config
    if head is None or not head.target.endswith("MaskedLM") or config.model_type not in ("bert", "distilbert"):
        return head
    return head if getattr(config, "hidden_act", getattr(config, "activation", None)) == "gelu" else None


def expect_possible(config: Any) -> _Shape:
    """How the architecture differs from Longformer; raises ArgumentError if it cannot be converted."""
    kind = config.model_type
    if kind not in _SHAPES:
        hint = "bart converts to LED; other position tables cannot be extended by copies"
        raise ArgumentError("MODEL", f"one of {', '.join(_SHAPES)}", kind, hint)
    wrong = []
    if getattr(config, "embedding_size", config.hidden_size) != config.hidden_size:
        wrong.append(f"embeddings of {config.embedding_size} that are projected to {config.hidden_size}")
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        wrong.append(f"{config.position_embedding_type} positions")
    if getattr(config, "is_decoder", False):
        wrong.append("causal attention")
    if wrong:
        hint = "Longformer has none of these; choose another checkpoint"
        raise ArgumentError("MODEL", "a plain encoder with a table of positions", " and ".join(wrong), hint)
    return _SHAPES[kind]


def _config(source: Any, shape: _Shape, max_length: int, window: int | Sequence[int]) -> Any:
    expect_length(max_length)
    pad = source.pad_token_id or 0
    same = {
        name: getattr(source, name)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range")
    }
    labels = {name: getattr(source, name) for name in ("id2label", "label2id")}
    return transformers.LongformerConfig(
        **same,
        **labels,
        attention_window=windows_of(window, source.num_hidden_layers),
        intermediate_size=source.hidden_dim if shape.prefix == "distilbert" else source.intermediate_size,
        hidden_act=source.activation if shape.prefix == "distilbert" else source.hidden_act,
        hidden_dropout_prob=getattr(source, "hidden_dropout_prob", getattr(source, "dropout", 0.1)),
        attention_probs_dropout_prob=getattr(
            source, "attention_probs_dropout_prob", getattr(source, "attention_dropout", 0.1)
        ),
        max_position_embeddings=max_length + pad + 1,
        type_vocab_size=getattr(source, "type_vocab_size", 1),
        layer_norm_eps=getattr(source, "layer_norm_eps", 1e-12),
        pad_token_id=pad,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        sep_token_id=getattr(source, "sep_token_id", None) or source.eos_token_id or 2,
        dtype=source.dtype,
        tie_word_embeddings=source.tie_word_embeddings,
    )


def _state(model: Any, shape: _Shape, head: _Head | None, config: Any, report: Report) -> dict[str, Tensor]:
    """The tensors of the source under Longformer's names, copies included; all are written down."""
    state: dict[str, Tensor] = {}
    for source, tensor in model.state_dict().items():
        name = _name(source, model, shape, head)
        if source.endswith(("position_ids", "token_type_ids")):
            continue
        if name.endswith("embeddings.position_embeddings.weight"):
            first = config.pad_token_id + 1
            used = tensor[first if shape.offset is None else shape.offset :]
            reserved = tensor[:first] if shape.offset is None else tensor.new_zeros(first, tensor.shape[1])
            state[name] = tile(used, config.max_position_embeddings - first, reserved)
            how = f"rows repeated from {len(used)} to {config.max_position_embeddings - first}, from row {first} on"
            report.add(name, COPIED, source, state[name], how)
            continue
        state[name] = tensor
        report.add(name, KEPT, source, tensor)
        if _ATTENTION in name:
            place, _, kind = name.rpartition(".")
            state[f"{place}_global.{kind}"] = tensor.clone()
            report.add(f"{place}_global.{kind}", COPIED, source, tensor, "starts as the local projection")
    if "lm_head.decoder.bias" in state or "lm_head.bias" in state:  # one tensor under two names
        bias = state.get("lm_head.bias", state.get("lm_head.decoder.bias"))
        assert bias is not None
        for name in ("lm_head.bias", "lm_head.decoder.bias"):
            if name not in state:
                report.add(name, KEPT, "the bias of the head", bias, "one tensor under two names")
            state[name] = bias
    return state


def _name(source: str, model: Any, shape: _Shape, head: _Head | None) -> str:
    """Longformer's name of a tensor of the source."""
    for old, new in {} if head is None else head.names.items():
        if source.startswith(f"{old}.") or source == old:
            return new + source[len(old) :]
    is_base = model.base_model is model
    inner = source if is_base else source.removeprefix(f"{shape.prefix}.")
    if not is_base and inner == source:
        return source  # of the head
    for old, new in shape.names.items():
        inner = inner.replace(old, new)
    return inner if head is None else f"longformer.{inner}"


def _made(name: str, like: Tensor, report: Report) -> Tensor:
    """A tensor that the source does not have: zeros for token types, a pooler that passes its input on."""
    tensor = torch.zeros_like(like)
    if name.endswith("pooler.dense.weight"):
        tensor = torch.eye(like.shape[0], dtype=like.dtype)
    elif not name.endswith(("token_type_embeddings.weight", "pooler.dense.bias")):
        raise ArgumentError("MODEL", f"a tensor for {name}", "none", "its architecture is not the usual one")
    report.add(name, MADE, "", tensor, "the identity" if "weight" in name and "pooler" in name else "zeros")
    return tensor


def _remark(model: Any, shape: _Shape, head: _Head | None, report: Report) -> None:
    if head is None and model.base_model is not model:
        report.remarks.append(f"the head of {type(model).__name__} has no equal in Longformer and is left out")
    if shape.offset is not None:
        report.remarks.append(
            "Longformer counts positions without padding, the source counts padding too: texts padded on the right are "
            "equal, texts padded on the left are not"
        )
    report.remarks.append(
        "global projections get no gradient while no token is global; copy the local ones again after such training"
    )


@torch.no_grad()
def self_checks(model: Any, converted: Any) -> list[Check]:
    """Where theory says equal: short texts, and texts whose tokens are all global; last hidden states."""
    source, target = model.base_model, converted.base_model
    config, noise = target.config, ROUNDING[model.dtype]
    used = source.embeddings.position_embeddings.weight.shape[0] - config.pad_token_id - 1
    longest = min(used, config.max_position_embeddings - config.pad_token_id - 1)
    short = min(min(config.attention_window) // 2 + 1, longest)
    found = []
    for words, seqlen, is_global in (
        (f"{short} tokens, the window reaches all", short, 0),
        (f"{min(longest, 2 * short + 1)} tokens, all global", min(longest, 2 * short + 1), 1),
    ):
        ids = torch.randint(1, config.vocab_size - 1, (2, seqlen), generator=torch.Generator().manual_seed(0))
        ids = torch.where(ids >= config.pad_token_id, ids + 1, ids) if config.pad_token_id else ids
        mask = torch.ones_like(ids)
        expected = source(ids, attention_mask=mask)[0].double()
        got = target(ids, attention_mask=mask, global_attention_mask=mask * is_global)[0].double()
        found.append(Check(words, float((got - expected).abs().max() / expected.abs().max()), noise))
    return found


__all__ = ["convert", "expect_possible", "self_checks", "to_longformer"]
