"""Who sees whom: the mask language, and the single truth of every mask in hasten.

Values (`Full Causal Window Global BlockSparse Documents Padding Dense`) joined by `&` and `|`; `keep()`
is what they mean. Nothing here knows about tiles, kernels or models.
"""

from hasten.masks.algebra import And, Cells, Mask, Or
from hasten.masks.bands import Causal, Full, Window
from hasten.masks.conventions import from_allenai_window, from_longformer_window, from_mistral_window
from hasten.masks.data import BlockSparse, Dense, Documents, Global, Padding
from hasten.masks.wire import decode, encode

__all__ = [
    "And",
    "BlockSparse",
    "Causal",
    "Cells",
    "Dense",
    "Documents",
    "Full",
    "Global",
    "Mask",
    "Or",
    "Padding",
    "Window",
    "decode",
    "encode",
    "from_allenai_window",
    "from_longformer_window",
    "from_mistral_window",
]
