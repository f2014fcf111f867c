"""The grids of attention problems: lengths, heads, sizes, strides, masks, features, packed sequences.

Lists of `Case`, one a question, each small enough for Triton's interpreter. Every list varies one thing and keeps the
rest; `EVERYTHING` has the features meet each other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hasten.masks import BlockSparse, Causal, Dense, Documents, Full, Global, Mask, Padding, Window
from tests.ops.cases import Case

Build = Callable[[Case, str], Mask]


def fixed(mask: Mask) -> Build:
    return lambda case, device: mask


def random_bool(share: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share


def blocks(size: int, lead: str = "", share: float = 0.4) -> Build:
    """A random block layout, shared or for each batch entry ("b") and head ("h"); its second row of blocks is empty."""

    def build(case: Case, device: str) -> Mask:
        own = [{"b": case.batch, "h": case.num_heads, "1": 1}[letter] for letter in lead]
        layout = random_bool(share, *own, -(-case.seqlen_q // size), -(-case.keys // size))
        layout[..., 1:2, :] = False
        return BlockSparse(layout.to(device), size)

    return build


def dense(shape: str, share: float = 0.5) -> Build:
    """A random matrix over the letters of `shape` (of bhqk1); its sixth row is empty."""

    def build(case: Case, device: str) -> Mask:
        sizes = {"b": case.batch, "h": case.num_heads, "q": case.seqlen_q, "k": case.keys, "1": 1}
        matrix = random_bool(share, *(sizes[letter] for letter in shape))
        if matrix.shape[-2] > 1:
            matrix[..., 5, :] = False
        return Dense(matrix.to(device))

    return build


def flags(share: float, *, per_row: bool) -> Build:
    """Global tokens as a bool tensor."""
    return lambda case, device: Global(random_bool(share, *((case.batch,) if per_row else ()), case.keys).to(device))


def documents(*bounds: object) -> Build:
    return lambda case, device: Documents(torch.tensor(bounds, dtype=torch.int32, device=device))


def padding(*lengths: int, side: str = "right") -> Build:
    return lambda case, device: Padding(torch.tensor(lengths, dtype=torch.int32, device=device), side)


def both(first: Build, second: Build) -> Build:
    return lambda case, device: first(case, device) & second(case, device)


def either(first: Build, second: Build) -> Build:
    return lambda case, device: first(case, device) | second(case, device)


GRIDS = (
    "LENGTHS",
    "LONG",
    "EMPTY",
    "HEADS",
    "DIMS",
    "SMALL_DIMS",
    "LAYOUTS",
    "MASKS",
    "FEATURES",
    "EVERYTHING",
    "PACKED",
)

FULL, CAUSAL = fixed(Full()), fixed(Causal())
LONGFORMER = fixed(Window(9, 9) | Global((0, 1, 69)))

SQUARE = [1, 17, 63, 64, 65, 127, 129]
UNEQUAL = [(1, 129), (129, 1), (17, 127), (127, 17), (63, 65), (65, 63), (191, 257), (257, 64)]
LENGTHS = [
    Case(name=f"{kind}-{seqlen_q}x{seqlen_k}", seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=32, mask=mask)
    for seqlen_q, seqlen_k in [*((length, length) for length in SQUARE), *UNEQUAL]
    for kind, mask in (("full", FULL), ("causal", CAUSAL))
]
LONG = [
    Case(name="causal-1000", num_heads=1, seqlen_q=1000, mask=CAUSAL),
    Case(name="full-1000x777", num_heads=1, seqlen_q=1000, seqlen_k=777),
]
EMPTY = [
    Case(name="no-keys", batch=2, seqlen_q=17, seqlen_k=0),
    Case(name="no-keys-causal", seqlen_q=17, seqlen_k=0, mask=CAUSAL),
    Case(name="no-keys-sinks", seqlen_q=17, seqlen_k=0, has_sinks=True),
    Case(name="no-queries", batch=2, seqlen_q=0, seqlen_k=17),
    Case(name="no-batch", batch=0, seqlen_q=17),
    Case(name="nothing", seqlen_q=0, seqlen_k=0),
]
HEADS = [
    Case(
        name=f"{num_heads}-on-{num_kv_heads}", seqlen_q=21, num_heads=num_heads, num_kv_heads=num_kv_heads, mask=CAUSAL
    )
    for num_heads, num_kv_heads in [(4, 4), (3, 1), (8, 2), (5, 1), (7, 1), (8, 1), (71, 1)]
]
HEAD_DIMS = [16, 24, 40, 64, 72, 80, 96, 128, 160, 192, 256]
UNEQUAL_DIMS = [(16, 40), (64, 16), (192, 128), (40, 72), (64, 256)]
DIMS = [
    Case(name=f"dim-{head_dim}-{head_dim_v}", seqlen_q=70, head_dim=head_dim, head_dim_v=head_dim_v, mask=CAUSAL)
    for head_dim, head_dim_v in [*((size, size) for size in HEAD_DIMS), *UNEQUAL_DIMS]
]
SMALL_DIMS = [Case(name=f"dim-{size}", seqlen_q=33, head_dim=size, mask=CAUSAL) for size in (1, 3, 8)]

LAYOUTS = [
    Case(
        name=f"inputs-{layout}",
        batch=2,
        seqlen_q=37,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        mask=CAUSAL,
        layout=layout,
    )
    for layout in (
        "heads_first",
        "sliced_heads",
        "sliced_dim",
        "misaligned",
        "every_second",
        "dim_first",
        "expanded_heads",
        "expanded_batch",
    )
] + [
    Case(
        name=f"dout-{layout}",
        batch=2,
        seqlen_q=37,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        mask=CAUSAL,
        dout_layout=layout,
    )
    for layout in ("ones", "heads_first", "sliced_heads", "every_second", "misaligned")
]

MASKS = [
    Case(name="window-9-0", mask=fixed(Window(9, 0))),
    Case(name="window-70-20", mask=fixed(Window(70, 20))),
    Case(name="window-none-3", mask=fixed(Window(None, 3))),
    Case(name="window-3-none", mask=fixed(Window(3, None))),
    Case(name="window-0-0", mask=fixed(Window(0, 0))),
    Case(name="window-rows-without-keys", seqlen_q=190, seqlen_k=60, mask=fixed(Window(2, 2))),
    Case(name="window-fewer-queries", seqlen_q=33, seqlen_k=160, mask=fixed(Window(20, 4))),
    Case(name="dilated", batch=2, mask=fixed(Window(6, 6, dilation=3))),
    Case(name="dilated-causal", mask=fixed(Window(None, 0, dilation=4))),
    Case(name="dilated-70x131", seqlen_q=70, seqlen_k=131, mask=fixed(Window(4, 2, dilation=5))),
    Case(name="dilated-131x70", seqlen_q=131, seqlen_k=70, mask=fixed(Window(4, 2, dilation=5))),
    Case(name="dilated-further-than-long", seqlen_q=5, mask=fixed(Window(1, 1, dilation=7))),
    Case(name="dilated-per-head", mask=fixed(Window(6, 6, dilation=(1, 5)))),
    Case(name="dilated-and-global", mask=fixed(Window(6, 0, dilation=2) | Global((3,)))),
    Case(name="global-alone", mask=fixed(Global((0, 64, 130)))),
    Case(name="global-none", mask=fixed(Global(()))),
    Case(name="global-flags", mask=flags(0.05, per_row=False)),
    Case(name="global-flags-per-row", batch=2, mask=either(fixed(Window(5, 5)), flags(0.05, per_row=True))),
    Case(name="global-keys-only", mask=fixed(Window(5, 5) | Global((2, 100), queries=False))),
    Case(name="global-queries-only", mask=fixed(Window(5, 5) | Global((2, 100), keys=False))),
    Case(name="longformer", mask=LONGFORMER),
    Case(name="longformer-200", seqlen_q=200, mask=fixed(Window(16, 16) | Global((0, 150)))),
    Case(name="longformer-70x131", seqlen_q=70, seqlen_k=131, mask=LONGFORMER),
    Case(name="longformer-131x71", seqlen_q=131, seqlen_k=71, mask=LONGFORMER),
    Case(name="longformer-causal", mask=both(CAUSAL, LONGFORMER)),
    Case(name="longformer-padded", batch=2, mask=both(LONGFORMER, padding(131, 40))),
    Case(name="blocks-16", mask=blocks(16)),
    Case(name="blocks-24-per-head", mask=blocks(24, "h")),
    Case(name="blocks-64-per-row", batch=2, seqlen_q=200, mask=blocks(64, "b1")),
    Case(name="blocks-32-per-row-and-head", batch=2, mask=blocks(32, "bh")),
    Case(name="blocks-16-70x131", seqlen_q=70, seqlen_k=131, mask=blocks(16, "1h")),
    Case(name="blocks-none", mask=blocks(64, share=0.0)),
    Case(name="blocks-causal", mask=both(CAUSAL, blocks(16))),
    Case(name="documents", batch=2, mask=documents(0, 30, 64, 65, 131)),
    Case(name="documents-causal", batch=2, mask=both(CAUSAL, documents(0, 30, 30, 100, 131))),
    Case(name="documents-window", mask=both(fixed(Window(8, 3)), documents(0, 70, 131))),
    Case(name="documents-per-row", batch=2, mask=both(CAUSAL, documents([0, 30, 131, 131], [0, 1, 64, 131]))),
    Case(name="documents-with-gaps", mask=documents(10, 30, 100)),
    Case(name="documents-70x131", seqlen_q=70, seqlen_k=131, mask=documents(0, 90, 131)),
    Case(name="documents-or-global", mask=either(documents(0, 64, 131), fixed(Global((0,))))),
    Case(name="padding-right", batch=2, mask=padding(131, 50)),
    Case(name="padding-left", batch=2, mask=padding(7, 131, side="left")),
    Case(name="padding-causal-right", batch=2, mask=both(CAUSAL, padding(100, 65))),
    Case(name="padding-causal-left", batch=2, mask=both(CAUSAL, padding(100, 65, side="left"))),
    Case(name="padding-window-left", batch=2, mask=both(fixed(Window(30, 0)), padding(100, 65, side="left"))),
    Case(name="padding-of-all", batch=2, mask=padding(0, 131)),
    Case(name="padding-33x131", batch=2, seqlen_q=33, seqlen_k=131, mask=both(CAUSAL, padding(100, 20))),
    Case(name="dense", mask=dense("qk")),
    Case(name="dense-sparse-per-head", mask=dense("hqk", 0.02)),
    Case(name="dense-per-row", batch=2, mask=dense("b1qk")),
    Case(name="dense-per-row-and-head", batch=2, mask=dense("bhqk")),
    Case(name="dense-one-row", batch=2, mask=dense("b11k")),
    Case(name="dense-causal", mask=both(CAUSAL, dense("qk", 0.9))),
    Case(name="all-of-three", mask=both(both(CAUSAL, fixed(Window(40, None))), dense("qk", 0.9))),
]

FEATURES = [
    Case(name="softcap", softcap=1.5),
    Case(name="softcap-causal-50x131", seqlen_q=50, seqlen_k=131, softcap=5.0, mask=CAUSAL),
    Case(name="softcap-alibi", softcap=1.5, alibi="h", mask=CAUSAL),
    Case(name="softcap-empty-rows", seqlen_q=131, seqlen_k=70, softcap=1.5, mask=CAUSAL),
    Case(name="softcap-longformer", softcap=1.5, mask=LONGFORMER),
    Case(name="sinks", seqlen_q=70, batch=2, has_sinks=True),
    Case(name="sinks-empty-rows", seqlen_q=131, seqlen_k=70, has_sinks=True, mask=CAUSAL),
    Case(name="sinks-window-gqa", num_heads=4, num_kv_heads=2, has_sinks=True, mask=fixed(Window(20, 0))),
    Case(name="sinks-lse", has_sinks=True, upstream="both"),
    *(
        Case(name=f"bias-{shape}", batch=2, seqlen_q=70, bias=shape)
        for shape in ("qk", "hqk", "1hqk", "b1qk", "bhqk", "11qk", "b11k", "h1k", "bhq1", "k")
    ),
    Case(name="bias-float32", bias="hqk", bias_dtype=torch.float32),
    Case(name="bias-causal-gqa", seqlen_q=70, num_heads=4, num_kv_heads=2, bias="1hqk", mask=CAUSAL),
    Case(name="bias-70x131", seqlen_q=70, seqlen_k=131, bias="hqk", mask=CAUSAL),
    Case(name="bias-131x70", seqlen_q=131, seqlen_k=70, bias="hqk", mask=CAUSAL),
    Case(name="bias-longformer", batch=2, bias="bhqk", mask=LONGFORMER),
    Case(name="bias-hides", seqlen_q=70, batch=2, bias="bhqk", hides=True),
    Case(name="bias-hides-shared", seqlen_q=70, batch=2, bias="qk", hides=True),
    Case(name="bias-hides-softcap", seqlen_q=70, bias="hqk", hides=True, softcap=2.0),
    Case(name="alibi", seqlen_q=70, batch=2, alibi="h"),
    Case(name="alibi-per-row", seqlen_q=70, batch=2, alibi="bh", mask=CAUSAL),
    Case(name="alibi-70x131", seqlen_q=70, seqlen_k=131, alibi="h", mask=CAUSAL),
    Case(name="alibi-131x70", seqlen_q=131, seqlen_k=70, alibi="h"),
    Case(name="alibi-documents", batch=2, alibi="h", mask=documents(0, 50, 131)),
    Case(name="alibi-longformer", alibi="h", mask=LONGFORMER),
    Case(name="dropout", seqlen_q=50, batch=2, dropout_p=0.3),
    Case(name="dropout-causal-gqa", batch=2, seqlen_q=40, num_heads=4, num_kv_heads=2, dropout_p=0.17, mask=CAUSAL),
    Case(name="dropout-longformer", seqlen_q=80, dropout_p=0.5, mask=LONGFORMER),
    Case(name="dropout-documents", seqlen_q=50, batch=2, dropout_p=0.3, mask=documents(0, 33, 50)),
    Case(name="dropout-dilated", seqlen_q=50, batch=2, dropout_p=0.3, mask=fixed(Window(6, 6, dilation=3))),
    Case(name="dropout-bias", seqlen_q=50, dropout_p=0.3, bias="hqk"),
    Case(name="dropout-sinks", seqlen_q=50, dropout_p=0.3, has_sinks=True, upstream="both"),
    Case(name="scale", scale=0.7),
    Case(name="scale-negative", scale=-0.3, mask=CAUSAL),
    Case(name="scale-zero", scale=0.0, mask=CAUSAL),
    Case(name="lse-alone", seqlen_q=70, batch=2, upstream="lse"),
    Case(name="lse-alone-causal-gqa", num_heads=4, num_kv_heads=2, upstream="lse", mask=CAUSAL),
    Case(name="lse-empty-rows", seqlen_q=131, seqlen_k=70, upstream="both", mask=CAUSAL),
    Case(name="lse-longformer-softcap", upstream="both", softcap=2.0, mask=LONGFORMER),
    Case(name="lse-documents", batch=2, upstream="both", mask=documents(0, 50, 131)),
    Case(name="lse-dilated", batch=2, upstream="both", mask=fixed(Window(6, 6, dilation=3))),
]

EVERYTHING = [
    Case(
        name="everything-band",
        batch=2,
        seqlen_q=70,
        seqlen_k=99,
        num_heads=2,
        num_kv_heads=1,
        head_dim=40,
        head_dim_v=24,
        mask=both(fixed(Window(60, 0)), padding(99, 81)),
        softcap=3.0,
        has_sinks=True,
        bias="1hqk",
        hides=True,
        dropout_p=0.1,
        upstream="both",
        layout="heads_first",
        dout_layout="heads_first",
    ),
    Case(
        name="everything-lists",
        batch=2,
        seqlen_q=99,
        num_heads=2,
        num_kv_heads=1,
        head_dim=24,
        head_dim_v=40,
        mask=both(LONGFORMER, padding(99, 81)),
        softcap=3.0,
        has_sinks=True,
        alibi="bh",
        dropout_p=0.1,
        upstream="both",
        layout="sliced_heads",
        dout_layout="ones",
    ),
]

RAGGED = ((17, 17), (64, 64), (1, 1), (100, 100))
CROSSED = ((17, 64), (130, 65), (1, 90), (65, 1))
PACKED = [
    Case(name="packed-full", lengths=RAGGED),
    Case(name="packed-causal", lengths=RAGGED, mask=CAUSAL),
    Case(name="packed-window", lengths=RAGGED, mask=fixed(Window(9, 3))),
    Case(name="packed-crossed-full", lengths=CROSSED),
    Case(name="packed-crossed-causal", lengths=CROSSED, mask=CAUSAL),
    Case(name="packed-crossed-window", lengths=CROSSED, mask=fixed(Window(9, 0))),
    Case(name="packed-one", lengths=((129, 129),), mask=CAUSAL),
    Case(name="packed-longer-max", lengths=RAGGED, slack=100, mask=CAUSAL),
    Case(name="packed-no-queries", lengths=((0, 20), (65, 65), (0, 3)), mask=CAUSAL),
    Case(name="packed-no-keys", lengths=((20, 0), (65, 65), (3, 0)), mask=CAUSAL),
    Case(name="packed-no-both", lengths=((0, 0), (20, 20), (0, 0), (0, 0), (70, 70), (0, 0)), mask=CAUSAL),
    Case(name="packed-only-empty", lengths=((0, 0), (0, 0))),
    Case(name="packed-nothing-to-see", lengths=((5, 0), (70, 0))),
    Case(name="packed-gqa", lengths=CROSSED, num_heads=4, num_kv_heads=2, mask=CAUSAL),
    Case(name="packed-dim-72-40", lengths=RAGGED, head_dim=72, head_dim_v=40, mask=CAUSAL),
    Case(name="packed-softcap-sinks", lengths=CROSSED, softcap=2.0, has_sinks=True, upstream="both", mask=CAUSAL),
    Case(name="packed-alibi", lengths=CROSSED, alibi="h", mask=CAUSAL),
    Case(name="packed-dropout", lengths=CROSSED, dropout_p=0.3, mask=CAUSAL),
    Case(name="packed-lse", lengths=CROSSED, upstream="lse"),
    Case(name="packed-heads-first", lengths=RAGGED, layout="heads_first", dout_layout="ones", mask=CAUSAL),
    Case(name="packed-sliced-heads", lengths=RAGGED, layout="sliced_heads", dout_layout="sliced_heads", mask=CAUSAL),
    Case(name="packed-many", lengths=((3, 3),) * 25, mask=CAUSAL),
]

# packed sequences under masks that are no band: outside the envelope of portable
PACKED_LISTS = [
    Case(name="packed-longformer", lengths=RAGGED, mask=fixed(Window(5, 5) | Global((0,)))),
    Case(name="packed-dilated", lengths=CROSSED, mask=fixed(Window(3, 3, dilation=2)), upstream="both"),
    Case(name="packed-dilated-per-head", lengths=CROSSED, mask=fixed(Window(3, 0, dilation=(1, 3)))),
    Case(name="packed-longformer-gqa", lengths=RAGGED, num_heads=4, num_kv_heads=2, mask=fixed(Global((0,)))),
]
