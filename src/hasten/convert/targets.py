"""Which class a converted model has: transformers' own where one can hold the result, else one that is carried along.

Decides class, configuration and packing from the wanted heads, and builds the model. Knows no method of merging.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor
from transformers.initialization import no_init_weights

from hasten.convert import carried
from hasten.convert.heads import CARRIED_SUFFIX, Layout, Site, layout_of
from hasten.errors import ArgumentError

_HAVE_KV_HEADS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
_CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


@dataclass(frozen=True)
class Target:
    """The class of a result, its configuration, how it packs heads, and the Auto class if it is a carried one."""

    kind: Any
    config: Any
    layout: Layout
    carried_as: str | None = None

    @property
    def name(self) -> str:
        """Class name, with a word on where it comes from."""
        return f"{self.kind.__name__} ({'carried in the checkpoint' if self.carried_as else 'of transformers'})"


def base_type(config: Any) -> str:
    """The model_type without what a carried class adds."""
    return str(config.model_type).removesuffix(CARRIED_SUFFIX)


def has_equal_groups_only(config: Any) -> bool:
    """True if no class for this architecture can hold groups of different sizes."""
    return base_type(config) in (*_HAVE_KV_HEADS, "gpt_bigcode")


def choose(model: Any, sites: list[Site], kv_heads: Mapping[str, int], kv_index: Mapping[str, list[int]]) -> Target:
    """The class that holds these key/value heads, by path; kv_index only for layers that need one.

    Raises ArgumentError if no class can, as for a model with another head than language modelling where only a
    carried class would do.
    """
    name, wanted = base_type(model.config), set(kv_heads.values())
    if len(wanted) == 1 and not kv_index:
        (count,) = wanted
        if count == sites[0].num_heads:
            return _multi_head(model, name, count)
        own = _own_class(model, name, count)
        if own is not None:
            return own
    return _carried(model, name, kv_heads, kv_index)


def _own_class(model: Any, name: str, count: int) -> Target | None:
    """Transformers' class for `count` key/value heads in every layer, if there is one."""
    if name in _HAVE_KV_HEADS:
        return _same(model, name, num_key_value_heads=count)
    if name == "falcon":
        return _falcon(model, count)
    if name == "gpt_bigcode" and count == 1:
        return _same(model, name)
    if name == "gpt2" and count == 1 and not model.config.scale_attn_by_inverse_layer_idx:
        kind = getattr(transformers, type(model).__name__.replace("GPT2LMHeadModel", "GPTBigCodeForCausalLM"), None)
        kind = kind or getattr(transformers, type(model).__name__.replace("GPT2", "GPTBigCode"), None)
        if kind is not None:
            leave = ("reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx")
            return _of(kind, _config(transformers.GPTBigCodeConfig, model.config, leave, multi_query=True))
    return None


def _falcon(model: Any, count: int) -> Target | None:
    config = model.config
    if config.new_decoder_architecture:
        return _same(model, "falcon", num_kv_heads=count)
    if count == 1:
        return _same(model, "falcon", multi_query=True, num_kv_heads=1)
    if config.parallel_attn:
        changes = {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "multi_query": False}
        return _same(model, "falcon", num_kv_heads=count, **changes)
    return None


def _multi_head(model: Any, name: str, count: int) -> Target:
    """The class with a key/value head for every query head."""
    if name in _HAVE_KV_HEADS:
        return _same(model, name, num_key_value_heads=count)
    if name == "falcon":
        changes = {} if model.config.new_decoder_architecture else {"multi_query": False}
        return _same(model, name, num_kv_heads=count, **changes)
    if name == "gpt_bigcode":
        kind = type(model).__name__.replace("GPTBigCodeForCausalLM", "GPT2LMHeadModel").replace("GPTBigCode", "GPT2")
        leave = ("multi_query", "num_key_value_heads", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
        return _of(getattr(transformers, kind), _config(transformers.GPT2Config, model.config, leave))
    return _same(model, name)


def _same(model: Any, name: str, **changes: Any) -> Target:
    """The model's own class, or the one that its carried class comes from, with some settings changed."""
    kind = type(model)
    if model.config.model_type == name:
        config = copy.deepcopy(model.config)
    else:
        kind = next(parent for parent in kind.__mro__ if parent.__module__.startswith("transformers."))
        config = _config(transformers.CONFIG_MAPPING[name], model.config, ("kv_heads", "kv_index"))
    for field, value in changes.items():
        setattr(config, field, value)
    return _of(kind, config)


def _of(kind: Any, config: Any) -> Target:
    return Target(kind, config, layout_of(config))


def _carried(model: Any, name: str, kv_heads: Mapping[str, int], kv_index: Mapping[str, list[int]]) -> Target:
    if name not in carried.FILES:
        got = f"{sorted(set(kv_heads.values()))} in {type(model).__name__}"
        raise ArgumentError("num_kv_heads", "1, the only number its class knows", got, "convert the original model")
    config_kind, kind, auto = carried.load(name)
    base = next(parent for parent in kind.__mro__ if parent.__module__.startswith("transformers."))
    if not isinstance(model, base):
        hint = f"load the model as {base.__name__}"
        raise ArgumentError("model", f"a {base.__name__}, whose result has a class", type(model).__name__, hint)
    config = _config(config_kind, model.config, ("kv_heads", "kv_index"))
    config.kv_heads, config.kv_index = dict(kv_heads), dict(kv_index)
    return Target(kind, config, layout_of(config), auto)


def _config(kind: Any, old: Any, leave: tuple[str, ...], **changes: Any) -> Any:
    """A configuration of another class with the settings of `old`."""
    drop = {*leave, "model_type", "architectures", "auto_map", "transformers_version"}
    kept = {name: value for name, value in old.to_dict().items() if name not in drop}
    return kind(**{**kept, **changes})


def carry_over(state: Mapping[str, Tensor], old: Layout, new: Layout) -> dict[str, Tensor]:
    """The tensors beside attention as the new class wants them: transposed if only one of the two is Conv1D."""
    if old.is_transposed == new.is_transposed:
        return dict(state)
    return {name: value.T.contiguous() if name.endswith(_CONV1D) else value for name, value in state.items()}


def build(target: Target, state: Mapping[str, Tensor], like: Any) -> Any:
    """A model of the target's class with copies of these tensors, on the device and in the mode of `like`."""
    with no_init_weights():
        model = target.kind._from_config(
            target.config, dtype=like.dtype, attn_implementation=like.config._attn_implementation
        )
    model.load_state_dict(state)
    model.tie_weights()
    if getattr(like, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(like.generation_config)
    return model.to(like.device).train(like.training)
