"""The mask language against loops that say each mask in words, and its values: equality, pictures, wire, errors."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hasten import masks
from hasten.errors import ArgumentError, ArgumentTypeError
from hasten.masks import BlockSparse, Causal, Dense, Documents, Full, Global, Mask, Padding, Window

SIZES = [(1, 1), (5, 5), (4, 9), (9, 4), (1, 7), (7, 1)]
BATCH, HEADS = 2, 3
Sees = Callable[[int, int, int, int], bool]  # batch, head, key position of the query, key


def by_loops(sees: Sees, seqlen_q: int, seqlen_k: int) -> Tensor:
    """The matrix of a mask, cell by cell; the last query stands at the last key."""
    keep = torch.zeros(BATCH, HEADS, seqlen_q, seqlen_k, dtype=torch.bool)
    for b, h, i, j in itertools.product(*map(range, keep.shape)):
        keep[b, h, i, j] = sees(b, h, seqlen_k - 1 - (seqlen_q - 1 - i), j)
    return keep


def check(mask: Mask, sees: Sees, seqlen_q: int, seqlen_k: int) -> None:
    keep = mask.keep(seqlen_q, seqlen_k, batch=BATCH, num_heads=HEADS)
    assert keep.dtype == torch.bool
    assert torch.equal(keep, by_loops(sees, seqlen_q, seqlen_k))
    if not mask.varies_by_batch:
        assert torch.equal(keep, keep[:1].expand_as(keep))
    if not mask.varies_by_head:
        assert torch.equal(keep, keep[:, :1].expand_as(keep))


# what each mask keeps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen_q, seqlen_k", SIZES)
def test_full_and_causal(seqlen_q: int, seqlen_k: int) -> None:
    check(Full(), lambda b, h, p, j: True, seqlen_q, seqlen_k)
    check(Causal(), lambda b, h, p, j: j <= p, seqlen_q, seqlen_k)


@pytest.mark.parametrize("seqlen_q, seqlen_k", SIZES)
@pytest.mark.parametrize("left, right", list(itertools.product([None, 0, 2, 20], repeat=2)))
def test_window(left: int | None, right: int | None, seqlen_q: int, seqlen_k: int) -> None:
    def sees(b: int, h: int, p: int, j: int) -> bool:
        return (left is None or p - j <= left) and (right is None or j - p <= right)

    check(Window(left, right), sees, seqlen_q, seqlen_k)


@pytest.mark.parametrize("seqlen_q, seqlen_k", SIZES)
@pytest.mark.parametrize("dilation", [2, 3, (1, 2, 4)])
@pytest.mark.parametrize("left, right", [(None, None), (1, 2), (2, 0), (0, None)])
def test_dilated_window(
    left: int | None, right: int | None, dilation: int | tuple[int, ...], seqlen_q: int, seqlen_k: int
) -> None:
    def sees(b: int, h: int, p: int, j: int) -> bool:
        step = dilation if isinstance(dilation, int) else dilation[h]
        steps = range(-(left if left is not None else 99), (right if right is not None else 99) + 1)
        return any(j == p + step * t for t in steps)

    check(Window(left, right, dilation), sees, seqlen_q, seqlen_k)


@pytest.mark.parametrize("seqlen_q, seqlen_k", SIZES)
@pytest.mark.parametrize("queries, keys", [(True, True), (True, False), (False, True), (False, False)])
def test_global(queries: bool, keys: bool, seqlen_q: int, seqlen_k: int) -> None:
    tokens = {0, seqlen_k // 2}
    flags = torch.rand(BATCH, seqlen_k) < 0.3

    def sees(b: int, h: int, p: int, j: int) -> bool:
        return (keys and j in tokens) or (queries and p in tokens)

    def sees_flags(b: int, h: int, p: int, j: int) -> bool:
        return (keys and bool(flags[b, j])) or (queries and p >= 0 and bool(flags[b, p]))

    check(Global(tuple(tokens), queries, keys), sees, seqlen_q, seqlen_k)
    check(Global(flags, queries, keys), sees_flags, seqlen_q, seqlen_k)
    check(Global(flags[0], queries, keys), lambda b, h, p, j: sees_flags(0, h, p, j), seqlen_q, seqlen_k)


@pytest.mark.parametrize("seqlen_q, seqlen_k", SIZES)
@pytest.mark.parametrize("lead", [(), (1,), (HEADS,), (1, HEADS), (BATCH, 1), (BATCH, HEADS)], ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_block_sparse(block_size: int, lead: tuple[int, ...], seqlen_q: int, seqlen_k: int) -> None:
    """Blocks are counted from the first query, not from where it stands."""
    layout = torch.rand(*lead, -(-seqlen_q // block_size), -(-seqlen_k // block_size)) < 0.5
    whole = layout.expand(BATCH, HEADS, *layout.shape[-2:])

    def sees(b: int, h: int, p: int, j: int) -> bool:
        i = p - (seqlen_k - seqlen_q)
        return bool(whole[b, h, i // block_size, j // block_size])

    check(BlockSparse(layout, block_size), sees, seqlen_q, seqlen_k)


@pytest.mark.parametrize("seqlen_q, seqlen_k", SIZES)
def test_documents(seqlen_q: int, seqlen_k: int) -> None:
    """Positions before the first bound and from the last one on belong to no document."""
    for bounds in ([[0, seqlen_k]] * 2, [[0, 2, 5, 9], [1, 1, 4, 4]], [[2, 3], [0, 0]], [[0], [3]]):

        def sees(b: int, h: int, p: int, j: int, bounds: list[list[int]] = bounds) -> bool:
            return any(lo <= p < hi and lo <= j < hi for lo, hi in itertools.pairwise(bounds[b]))

        check(Documents(torch.tensor(bounds)), sees, seqlen_q, seqlen_k)
        first = Documents(bounds[0])
        check(first, lambda b, h, p, j, sees=sees: sees(0, h, p, j), seqlen_q, seqlen_k)


@pytest.mark.parametrize("seqlen_q, seqlen_k", SIZES)
@pytest.mark.parametrize("lengths", [(0, 1), (3, 100), (7, 0)])
def test_padding(lengths: tuple[int, int], seqlen_q: int, seqlen_k: int) -> None:
    check(Padding(lengths), lambda b, h, p, j: j < lengths[b], seqlen_q, seqlen_k)
    check(Padding(lengths, side="left"), lambda b, h, p, j: seqlen_k - j <= lengths[b], seqlen_q, seqlen_k)


@pytest.mark.parametrize("seqlen_q, seqlen_k", SIZES)
def test_dense(seqlen_q: int, seqlen_k: int) -> None:
    sizes = BATCH, HEADS, seqlen_q, seqlen_k
    for is_shared in itertools.product([False, True], repeat=4):
        shape = [1 if shared else size for size, shared in zip(sizes, is_shared, strict=True)]
        matrix = torch.rand(shape) < 0.5
        whole = matrix.expand(sizes)
        check(Dense(matrix), lambda b, h, p, j, m=whole: bool(m[b, h, p - seqlen_k + seqlen_q, j]), seqlen_q, seqlen_k)
    matrix = torch.rand(seqlen_q, seqlen_k) < 0.5
    check(Dense(matrix), lambda b, h, p, j: bool(matrix[p - seqlen_k + seqlen_q, j]), seqlen_q, seqlen_k)


@pytest.mark.parametrize("seqlen_q, seqlen_k", SIZES)
def test_connectives(seqlen_q: int, seqlen_k: int) -> None:
    tokens, lengths = {0}, (1, 5)

    def sees(b: int, h: int, p: int, j: int) -> bool:
        return (abs(p - j) <= 1 or j in tokens or p in tokens) and j < lengths[b] and j <= p

    check((Window(1, 1) | Global((0,))) & Padding(lengths) & Causal(), sees, seqlen_q, seqlen_k)
    check(
        (Causal() & Padding(lengths)) | Window(0, 1),
        lambda b, h, p, j: (j <= p and j < lengths[b]) or 0 <= j - p <= 1,
        seqlen_q,
        seqlen_k,
    )


EMPTY = [Full(), Causal(), Window(1, 1, 2), Global(()), Documents([0]), Padding([0])]


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("mask", EMPTY, ids=repr)
def test_a_side_without_length(mask: Mask, seqlen_q: int, seqlen_k: int) -> None:
    assert mask.keep(seqlen_q, seqlen_k).shape == (1, 1, seqlen_q, seqlen_k)


def test_seqlen_k_is_that_of_q_unless_given() -> None:
    assert torch.equal(Causal().keep(5), Causal().keep(5, 5))


# pictures and alignment ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask, sizes, picture",
    [
        (Causal(), (2, 4), "###. ####"),
        (Causal(), (4, 2), ".. .. #. ##"),
        (Window(1, 1), (4, 4), "##.. ###. .### ..##"),
        (Window(1, 0, dilation=2), (4, 4), "#... .#.. #.#. .#.#"),
        (Window(0, 0) | Global((1,)), (3, 3), "##. ### .##"),
        (Global((1,), queries=False), (2, 3), ".#. .#."),
        (Documents([0, 2, 3]) & Causal(), (3, 3), "#.. ##. ..#"),
        (Padding([2], side="left"), (2, 3), ".## .##"),
    ],
    ids=lambda value: repr(value) if isinstance(value, Mask) else None,
)
def test_picture(mask: Mask, sizes: tuple[int, int], picture: str) -> None:
    assert mask.picture(*sizes) == picture.replace(" ", "\n")


def test_picture_of_one_batch_entry_and_head() -> None:
    mask = Padding([1, 3]) & Window(0, None, (1, 2))
    assert mask.picture(3, batch=0, head=0) == "#..\n...\n..."
    assert mask.picture(3, batch=1, head=0) == "###\n.##\n..#"
    assert mask.picture(3, batch=1, head=1) == "#.#\n.#.\n..#"


# conventions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 5])
def test_mistral_window(width: int) -> None:
    """`transformers`: a key is seen if query - sliding_window < key <= query."""
    check(masks.from_mistral_window(width), lambda b, h, p, j: p - width < j <= p, 9, 9)
    assert masks.from_mistral_window(width) == Window(width - 1, 0)


@pytest.mark.parametrize("width", [2, 4])
def test_longformer_windows(width: int) -> None:
    check(masks.from_longformer_window(width), lambda b, h, p, j: abs(p - j) <= width // 2, 9, 9)
    check(masks.from_allenai_window(width), lambda b, h, p, j: abs(p - j) <= width, 9, 9)


@pytest.mark.parametrize("window", [0, -1, 1.0, True, None])
@pytest.mark.parametrize(
    "convert",
    [masks.from_mistral_window, masks.from_longformer_window, masks.from_allenai_window],
    ids=lambda f: f.__name__,
)
def test_a_window_is_a_positive_int(convert: Callable[[int], Mask], window: int) -> None:
    with pytest.raises(ArgumentError, match=r"window: expected an int >= 1, got .*; take it from"):
        convert(window)


def test_longformer_window_is_even() -> None:
    with pytest.raises(ArgumentError, match="attention_window: expected an even number, got 3"):
        masks.from_longformer_window(3)


# values --------------------------------------------------------------------------------------------------------


def bits(*shape: int) -> Tensor:
    return (torch.arange(torch.Size(shape).numel()) % 3 == 0).view(shape)


VALUES: dict[str, Callable[[], Mask]] = {
    "Full()": Full,
    "Causal()": Causal,
    "Window(3, None)": lambda: Window(3, None),
    "Window(1, 2, dilation=3)": lambda: Window(1, 2, 3),
    "Window(1, 2, dilation=(1, 2))": lambda: Window(1, 2, (1, 2)),
    "Global((1, 5))": lambda: Global((5, 1, 5)),
    "Global((1,), queries=False)": lambda: Global((1,), queries=False),
    "Global(2x6, keys=False)": lambda: Global(bits(2, 6), keys=False),
    "BlockSparse(2x2, 3)": lambda: BlockSparse(bits(2, 2), 3),
    "Documents(3)": lambda: Documents([0, 4, 6]),
    "Padding(2)": lambda: Padding([2, 6]),
    "Padding(2, left)": lambda: Padding(torch.tensor([2, 6]), "left"),
    "Dense(6x6)": lambda: Dense(bits(6, 6)),
    "Window(1, 1) | Global((0,))": lambda: Window(1, 1) | Global((0,)),
    "(Window(1, 1) | Global((0,))) & Padding(2)": lambda: (Window(1, 1) | Global((0,))) & Padding([2, 6]),
    "(Causal() & Dense(6x6) & Documents(2)) | Dense(1x1)": lambda: (
        (Causal() & (Dense(bits(6, 6)) & Documents([0, 3]))) | Dense(bits(1, 1))
    ),
}


@pytest.mark.parametrize("text", VALUES)
def test_repr(text: str) -> None:
    assert repr(VALUES[text]()) == text


@pytest.mark.parametrize("text", VALUES)
def test_there_and_back_over_the_wire(text: str) -> None:
    mask = VALUES[text]()
    words, tensors = masks.encode(mask)
    back = masks.decode(words, tensors)
    assert back == mask and hash(back) == hash(mask) and repr(back) == repr(mask)
    assert torch.equal(back.keep(6, batch=2, num_heads=2), mask.keep(6, batch=2, num_heads=2))
    assert all(a is b for a, b in zip(masks.encode(back)[1], tensors, strict=True)), "the same tensors, not copies"


def test_many_tensors_keep_their_order_over_the_wire() -> None:
    mask: Mask = Padding([0])
    for length in range(1, 13):
        mask = mask | (Causal() & Padding([length]))
    assert masks.decode(*masks.encode(mask)) == mask
    assert [int(tensor) for tensor in masks.encode(mask)[1]] == list(range(13))


@pytest.mark.parametrize("text", VALUES)
@pytest.mark.parametrize("other", VALUES)
def test_equal_by_value(text: str, other: str) -> None:
    assert (VALUES[text]() == VALUES[other]()) == (text == other)
    if text == other:
        assert hash(VALUES[text]()) == hash(VALUES[other]())


def test_unequal_tensors_make_unequal_masks() -> None:
    assert Padding([2, 6]) != Padding([2, 5])
    assert Padding([2, 6]) != Padding([2])
    assert Padding([2, 6]) != Padding([2, 6], "left")
    assert Global((1,)) != Global((1,), keys=False)
    assert Full() != "Full()"


def test_one_dilation_for_all_heads_is_written_once() -> None:
    assert Window(1, 1, (2, 2)) == Window(1, 1, 2) and not Window(1, 1, (2, 2)).varies_by_head


def test_connectives_are_flat() -> None:
    mask = Causal() & (Window(1, 1) & Full())
    assert isinstance(mask, masks.And) and mask.masks == (Causal(), Window(1, 1), Full())
    mask = (Causal() | Window(1, 1)) | Full()
    assert isinstance(mask, masks.Or) and mask.masks == (Causal(), Window(1, 1), Full())


def test_masks_are_immutable() -> None:
    for make in VALUES.values():
        mask = make()
        names = [field.name for field in dataclasses.fields(mask)] or ["anything"]
        for name in names:
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(mask, name, None)


@pytest.mark.parametrize(
    "mask, by_batch, by_head",
    [
        (Causal(), False, False),
        (Window(1, 1, (1, 2)), False, True),
        (Global(bits(6)), False, False),
        (Global(bits(2, 6)), True, False),
        (BlockSparse(bits(2, 2), 3), False, False),
        (BlockSparse(bits(3, 2, 2), 3), False, True),
        (BlockSparse(bits(2, 1, 2, 2), 3), True, False),
        (Documents([0, 6]), False, False),
        (Documents(torch.tensor([[0, 6], [0, 3]])), True, False),
        (Padding([2]), True, False),
        (Dense(bits(2, 1, 6, 6)), True, False),
        (Dense(bits(3, 6, 6)), False, True),
        (Causal() & Padding([2]), True, False),
        (Causal() | Window(1, 1, (1, 2)), False, True),
    ],
    ids=repr,
)
def test_what_a_mask_varies_by(mask: Mask, by_batch: bool, by_head: bool) -> None:
    assert (mask.varies_by_batch, mask.varies_by_head) == (by_batch, by_head)


# errors --------------------------------------------------------------------------------------------------------


WRONG: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Window(-1, 0), ArgumentError, r"Window\.left: expected an int >= 0 or None, got -1"),
    (lambda: Window(0, 1.5), ArgumentError, r"Window\.right: .* got 1\.5"),  # type: ignore[arg-type]
    (lambda: Window(True, 0), ArgumentError, r"Window\.left: .* got True"),
    (lambda: Window(1, 1, 0), ArgumentError, r"Window\.dilation: expected ints >= 1, got 0"),
    (lambda: Window(1, 1, ()), ArgumentError, r"Window\.dilation: .* got \(\)"),
    (lambda: Window(1, 1, (1, 0)), ArgumentError, r"Window\.dilation: .* got \(1, 0\)"),
    (lambda: Window(1, 1, 1.5), ArgumentError, r"Window\.dilation: .* got 1\.5"),  # type: ignore[arg-type]
    (lambda: Window(1, 1, (1, 2)).keep(4, num_heads=3), ArgumentError, r"Window\.dilation: .* 3 heads, got \(1, 2\)"),
    (lambda: Global((-1,)), ArgumentError, r"Global\.tokens: expected positions >= 0, got \(-1,\)"),
    (lambda: Global((4,)).keep(4), ArgumentError, r"Global\.tokens: expected positions < 4, got 4"),
    (lambda: Global(torch.zeros(4)), ArgumentTypeError, r"Global\.tokens: expected torch\.bool, got torch\.float32"),
    (lambda: Global(bits(4)).keep(5), ArgumentError, r"Global\.tokens: expected shape \(5,\), got shape \(4,\)"),
    (lambda: Global(bits(2, 4)).keep(4, batch=3), ArgumentError, r"Global\.tokens: expected shape \(3, 4\)"),
    (lambda: BlockSparse(bits(4), 2), ArgumentError, r"BlockSparse\.layout: expected 2 or 3 or 4 dimensions"),
    (lambda: BlockSparse(bits(2, 2), 0), ArgumentError, r"BlockSparse\.block_size: expected an int >= 1, got 0"),
    (lambda: BlockSparse(bits(2, 2), 2).keep(5), ArgumentError, r"BlockSparse\.layout: expected shape \(3, 3\)"),
    (lambda: BlockSparse(torch.ones(2, 2), 2), ArgumentTypeError, r"BlockSparse\.layout: expected torch\.bool"),
    (lambda: Documents(torch.zeros(2)), ArgumentTypeError, r"Documents\.cu_seqlens: expected torch\.int32 or"),
    (lambda: Documents(torch.zeros(2, 2).int()).keep(4, batch=3), ArgumentError, r"Documents\.cu_seqlens: .* \(3, 2\)"),
    (
        lambda: Padding([1, 2]).keep(4, batch=3),
        ArgumentError,
        r"Padding\.lengths: expected shape \(3,\), got shape \(2,\)",
    ),
    (lambda: Padding(torch.ones(2)), ArgumentTypeError, r"Padding\.lengths: .* got torch\.float32"),
    (lambda: Padding([1], side="top"), ArgumentError, r"Padding\.side: expected 'left' or 'right', got 'top'"),
    (lambda: Dense(torch.ones(2, 2)), ArgumentTypeError, r"Dense\.matrix: expected torch\.bool, got torch\.float32"),
    (lambda: Dense([[True]]), ArgumentTypeError, r"Dense\.matrix: expected a tensor, got list"),  # type: ignore[arg-type]
    (lambda: Dense(bits(4)), ArgumentError, r"Dense\.matrix: expected 2 or 3 or 4 dimensions, got shape \(4,\)"),
    (
        lambda: Dense(bits(2, 4)).keep(3, 4),
        ArgumentError,
        r"Dense\.matrix: expected shape \(3, 4\), got shape \(2, 4\)",
    ),
    (lambda: Causal() & 3, ArgumentTypeError, "mask: expected a hasten mask, got int"),  # type: ignore[operator]
    (lambda: Causal() | None, ArgumentTypeError, "mask: expected a hasten mask, got NoneType"),  # type: ignore[operator]
    (lambda: (Causal() & Dense(bits(2, 4))).keep(3, 4), ArgumentError, r"Dense\.matrix: expected shape \(3, 4\)"),
]


@pytest.mark.parametrize("make, error, message", WRONG, ids=[message for _, _, message in WRONG])
def test_wrong_input_is_one_clear_line(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        make()
    assert "\n" not in str(caught.value) and ";" in str(caught.value)
