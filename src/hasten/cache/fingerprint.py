"""What K and V depend on beside the tokens, as one digest: other weights under the same name are a miss, never garbage.

Everything is in it: weights (each byte), configuration with its rotary settings, tokenizer and chat template, adapters,
dtype, and how pages are laid out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from hasten.cache.paged import Kind

# in the configuration, but of no effect on K and V: where it was loaded from, with what, and how it attends
_IDLE = ("_name_or_path", "transformers_version", "_attn_implementation", "use_cache", "torch_dtype", "dtype")


def fingerprint(
    model: Any, tokenizer: Any, layers: Sequence[Kind], page_size: int, dtype: torch.dtype, stored: torch.dtype
) -> str:
    """A hexadecimal digest; takes as long as reading the weights once.

    dtype: of K and V as the model has them; stored: as pages keep them.
    """
    whole = hashlib.sha256()
    config = {name: value for name, value in model.config.to_dict().items() if name not in _IDLE}
    layout = [[kind.window, kind.num_kv_heads, kind.head_dim, kind.head_dim_v] for kind in layers]
    adapters = repr(getattr(model, "peft_config", None)), repr(getattr(model, "active_adapter", None))
    about = [type(model).__name__, config, layout, page_size, str(dtype), str(stored), adapters]
    whole.update(json.dumps(about, sort_keys=True, default=str).encode())
    whole.update(_of_tokenizer(tokenizer))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with ThreadPoolExecutor(8) as pool:  # a digest lets other threads run
        for name, digest in zip(tensors, pool.map(_of_tensor, tensors.values()), strict=True):
            whole.update(name.encode() + b"\0" + digest)
    return whole.hexdigest()


def _of_tensor(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    with torch.no_grad():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()


def _of_tokenizer(tokenizer: Any) -> bytes:
    if tokenizer is None:
        return b"none"
    parts: list[Any] = [type(tokenizer).__name__, getattr(tokenizer, "chat_template", None)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts.append(backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(json.dumps(parts, default=str).encode()).digest()


__all__ = ["fingerprint"]
