"""Where transformers models meet hasten: importing this makes attn_implementation="hasten" known to transformers.

`accelerate` switches a model that is loaded; `register` is what the import does. Models are transformers' own.
"""

from hasten.models.accelerate import accelerate, attention_layers
from hasten.models.interface import register

__all__ = ["accelerate", "attention_layers", "register"]

register()
