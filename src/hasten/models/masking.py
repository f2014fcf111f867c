"""The mask interface of transformers: which hasten mask stands for `attention_mask` in the layers of a model.

Called by the mask makers of transformers (`create_causal_mask` and its siblings) once a forward and kind of
layer. Knows caches by their lengths and offsets only, and no model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import and_
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import masking_utils

from hasten.masks import Dense, Full, Mask, Padding, decode, encode
from hasten.models import patterns
from hasten.models.patterns import MaskFunction, Pattern
from hasten.ops import host


@dataclass(frozen=True, eq=False)
class ModelMask:
    """A mask on its way through a model, where `attention_mask` used to be a tensor.

    `num_keys`: layers read that many keys, from the first; None means all. A static cache is longer than
    what it holds, and masks are aligned with the last key.

    `ndim`, `contiguous` and `to` are what transformers and device maps ask of a prepared mask of 4 dimensions.
    """

    mask: Mask
    num_keys: int | None = None
    ndim: ClassVar[int] = 4

    def contiguous(self) -> ModelMask:
        """Itself: there is no memory to arrange."""
        return self

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> ModelMask:
        """The same mask with its tensors on `device`; itself if they are there, or it has none."""
        text, tensors = encode(self.mask)
        moved = [tensor.to(device, non_blocking=non_blocking) for tensor in tensors]
        is_there = all(one is other for one, other in zip(tensors, moved, strict=True))
        return self if is_there else replace(self, mask=decode(text, moved))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a hasten mask is no tensor and has no {name!r}: this layer does not call transformers' "
            "AttentionInterface, so attn_implementation='hasten' cannot serve the model; use 'eager' or 'sdpa'"
        )


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Tensor | ModelMask | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> ModelMask | Tensor:
    """The mask of queries q_offset... over keys kv_offset..., as transformers asks for it.

    attention_mask: bool (batch, seqlen), True for real tokens, from position 0 on; or a mask made before,
    which is returned. The result is exact: a `ModelMask`, or a bool tensor (batch, 1, q_length, kv_length)
    where the function is not made of known pieces or its place depends on a tensor that is not read.
    """
    if isinstance(attention_mask, ModelMask):
        return attention_mask
    sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    if torch.compiler.is_compiling():
        packed = None
        if attention_mask is None and q_length == kv_length > 1 and not options.get("allow_is_causal_skip", True):
            packed = torch.empty((batch_size, q_length), dtype=torch.bool, device=device)
        pattern = traced(mask_function, local_size, use_vmap, packed, options)
    else:
        pattern = patterns.read(mask_function)
    if pattern is not None:
        num_keys = _num_keys(pattern, q_length, kv_length, q_offset, kv_offset)
        if num_keys is not None:
            return _named(pattern, attention_mask, kv_length, kv_offset, num_keys)
        if attention_mask is None and q_length == 1 and _sees_all_before(pattern, kv_length):
            filled = torch.zeros(batch_size, dtype=torch.int32, device=device) + (q_offset + 1 - kv_offset)
            return ModelMask(Padding(filled.to(torch.int32)))
    cells: Tensor = masking_utils.sdpa_mask(
        **sizes,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    return cells


def _named(pattern: Pattern, attention_mask: Tensor | None, kv_length: int, kv_offset: int, num_keys: int) -> ModelMask:
    """The pattern and the padding over the first `num_keys` keys, by their names."""
    parts: list[Mask | None] = [pattern.band(num_keys)]
    if pattern.starts is not None:
        parts.append(patterns.documents(pattern.starts, host.can_read(pattern.starts)))
    if attention_mask is not None:
        parts.append(_padding(attention_mask[:, kv_offset : kv_offset + num_keys], num_keys))
    named = [part for part in parts if part is not None and not isinstance(part, Full)]
    mask = reduce(and_, named) if named else Full()
    return ModelMask(mask, None if num_keys == kv_length else num_keys)


def _num_keys(pattern: Pattern, q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int) -> int | None:
    """How many keys there are up to the last query's own, or None if only a tensor knows.

    A single query over a longer, static cache is left to the tensors: its shapes must not change from step
    to step, or a compiled model would be compiled again each time.
    """
    if not pattern.is_band:
        return kv_length
    if isinstance(q_offset, Tensor):
        if q_length == 1 or not host.can_read(q_offset):
            return None
        q_offset = int(q_offset)
    num_keys = q_offset + q_length - kv_offset
    if num_keys == kv_length:
        return kv_length
    is_sliceable = pattern.right == 0 and pattern.starts is None and q_length > 1 and 0 < num_keys < kv_length
    return num_keys if is_sliceable else None


def _sees_all_before(pattern: Pattern, kv_length: int) -> bool:
    return pattern.right == 0 and pattern.starts is None and (pattern.left is None or pattern.left >= kv_length - 1)


def _padding(keys: Tensor, num_keys: int) -> Mask | None:
    """Which keys are real, bool (batch, up to num_keys): None for all; the rest was never written."""
    if keys.shape[1] < num_keys:
        keys = torch.nn.functional.pad(keys, (0, num_keys - keys.shape[1]))
    if not host.can_read(keys):
        return Dense(keys[:, None, None, :])
    falls, rises = keys[:, 1:] < keys[:, :-1], keys[:, 1:] > keys[:, :-1]
    facts = torch.cat([keys.sum(-1), falls.any()[None], rises.any()[None]])
    *lengths, has_falls, has_rises = facts.tolist()  # the one wait for the device
    if min(lengths, default=num_keys) == num_keys:
        return None
    if has_falls and has_rises:
        return Dense(keys[:, None, None, :])
    return Padding(host.from_values(tuple(lengths), keys.device), "left" if has_rises else "right")


def traced(
    mask_function: MaskFunction, local_size: int | None, use_vmap: bool, packed: Tensor | None, options: dict[str, Any]
) -> Pattern | None:
    """The pattern under torch.compile, from what the mask maker says about the function it made."""
    if use_vmap or getattr(options.get("config"), "attention_chunk_size", None) is not None:
        return None
    return patterns.traced(mask_function, local_size, "allow_is_bidirectional_skip" in options, packed)
