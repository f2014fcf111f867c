"""Where K and V of past tokens are kept. `static` is the simple form: one request, all of it allocated at once."""

from hasten.cache.prompt_cache import PromptCache
from hasten.cache.static import EncoderDecoderKVCache, KVCache, KVLayer, allocate

__all__ = ["EncoderDecoderKVCache", "KVCache", "KVLayer", "PromptCache", "allocate"]
