"""The sweep of Hopper's tiles, as far as it needs no GPU: what is tried, on which shapes, and how it is told."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs triton")

from hasten.bench import hopper_tiles
from hasten.masks import Causal, Full
from hasten.ops.hopper import table
from hasten.ops.tiles import as_band


def test_every_line_of_the_table_is_a_candidate() -> None:
    for (head_dim, _), lines in table.FORWARD.items():
        assert {tile for _, tile in lines} <= set(hopper_tiles.CANDIDATES["forward", head_dim])
    for (head_dim, *_), tile in table.BACKWARD.items():
        assert tile in hopper_tiles.CANDIDATES["backward", head_dim]


@pytest.mark.parametrize(("kind", "pattern", "seqlen"), hopper_tiles.SHAPES)
def test_shapes_are_of_the_kind_they_say(kind: str, pattern: str, seqlen: int) -> None:
    shape = hopper_tiles.problem(pattern, seqlen, 64)
    band = as_band(shape.pattern.mask(256))
    assert table.kind_of(None if band is None else (band.left, band.right)) == kind
    assert shape.batch * shape.seqlen == (16384 if isinstance(shape.pattern.mask(256), Full | Causal) else seqlen)


def test_a_table_is_told_in_lines() -> None:
    shape = hopper_tiles.problem("causal", 1024, 64).fields()
    tile = {"consumers": 2, "block_n": 128}
    records = [{"phase": "forward", **shape, "tile": tile, "tflops": rate} for rate in (100.4, 200.0)]
    records.append({"failed": "no room"})
    assert hopper_tiles.summary(records) == ["forward 64: causal@1024", f"  {'(2, 128)':24} 100 200"]
