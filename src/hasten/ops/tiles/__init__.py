"""From a mask to work: which tiles of the attention matrix to visit, and which of them are partial.

`as_band` gives a closed form where there is one, `tile_lists` index lists for every mask. Called by every
implementation; knows no q, k or v.
"""

from hasten.ops.tiles.band import Band, KeyRange, as_band, band_tiles
from hasten.ops.tiles.lists import TileLists, build_tile_lists, tile_lists
from hasten.ops.tiles.pieces import Pieces

__all__ = ["Band", "KeyRange", "Pieces", "TileLists", "as_band", "band_tiles", "build_tile_lists", "tile_lists"]
