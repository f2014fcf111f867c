"""Where transformers models meet hasten: importing this makes attn_implementation="hasten" known to transformers.

`accelerate` switches a model that is loaded; `register` is what the import does. Models are transformers' own.
"""

from hasten.models.accelerate import accelerate, attention_layers
from hasten.models.interface import register
from hasten.models.longformer import LongformerSelfAttention
from hasten.models.tokens import Tokens, read_tokens

__all__ = ["LongformerSelfAttention", "Tokens", "accelerate", "attention_layers", "read_tokens", "register"]

register()
