"""Where K and V of past tokens are kept. `static` is the simple form: one request, all of it allocated at once."""

from hasten.cache.static import EncoderDecoderKVCache, KVCache, KVLayer, allocate

__all__ = ["EncoderDecoderKVCache", "KVCache", "KVLayer", "allocate"]
