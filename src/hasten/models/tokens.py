"""Which tokens of a batch are padding, local or global: read once a forward, shared by all its layers.

Called by Longformer models with the masks their users give. Knows masks and no layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.errors import ArgumentError, ArgumentTypeError
from hasten.masks import Dense, Global, Mask, Padding
from hasten.ops import host

PADDING, LOCAL, GLOBAL = 0, 1, 2
_FEW = 64  # global tokens that are the same in all rows become part of the mask's value, up to this many

Positions = Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a batch (batch, seqlen). None stands for nothing to say: no padding, no global token.

    is_real, is_global: bool (batch, seqlen); a global token is real. keys: the real keys as a mask. columns: the
    global keys, which every query sees. positions: int64 (batch, room), where the global tokens of each row
    stand, then others; holds: bool (batch, room), which of them are global. Both are None while there may be as
    many global tokens as tokens.

    near, far: only with a fixed room, float32 (batch, 1, 1, room + seqlen) and (batch, 1, 1, seqlen), 0 or -inf: what
    local queries see of the global tokens and then of all, and what global queries see.
    """

    is_real: Tensor | None = None
    is_global: Tensor | None = None
    keys: Mask | None = None
    columns: Mask | None = None
    positions: Tensor | None = None
    holds: Tensor | None = None
    near: Tensor | None = None
    far: Tensor | None = None

    @property
    def room(self) -> int:
        """How many global tokens a row can hold in `positions`."""
        return 0 if self.positions is None else self.positions.shape[1]


def read_tokens(
    attention_mask: Tensor | None,
    global_tokens: Tensor | Positions | None = None,
    *,
    batch: int,
    seqlen: int,
    device: torch.device,
    global_capacity: int | None = None,
) -> Tokens:
    """The tokens of a batch, from the masks of Longformer models.

    attention_mask: (batch, seqlen) of 0 (padding) and 1; or, without global_tokens, of 0, 1 and 2 (global); None
    for no padding. global_tokens: a mask (batch, seqlen) of 0 and 1, or positions, the same for all rows or a
    list for each. Padding that is marked global stays padding.

    global_capacity: None reads the masks (on a GPU one wait). A number promises that no row has more global
    tokens: nothing is read and no shape depends on values, as CUDA graphs need; a broken promise is an error,
    on a GPU a device-side assertion.

    Raises ArgumentError for other values, shapes, or positions out of range; values that may not be read
    (torch.compile, CUDA graphs) are taken on trust.
    """
    if global_capacity is not None and (not isinstance(global_capacity, int) or global_capacity < 0):
        raise ArgumentError("global_capacity", "a number of tokens >= 0", repr(global_capacity), "or leave it out")
    if attention_mask is not None:
        _expect_mask("attention_mask", attention_mask, batch, seqlen)
    if global_tokens is not None and not isinstance(global_tokens, Tensor):
        global_tokens = _from_positions(global_tokens, batch, seqlen, device)
    if global_tokens is not None:
        _expect_mask("global_attention_mask", global_tokens, batch, seqlen)
        _expect_values("global_attention_mask", global_tokens, 1, "1 marks a global token")
    if attention_mask is None and global_tokens is None:
        return Tokens()
    if attention_mask is not None:
        most = LOCAL if global_tokens is not None else GLOBAL
        words = "0 is padding, 1 a token" + (", 2 a global token" if most == GLOBAL else "; the other mask says global")
        _expect_values("attention_mask", attention_mask, most, words)
    codes = _merge(attention_mask, global_tokens).to(device)
    if global_capacity is not None:
        return _fixed(codes, min(global_capacity, seqlen))
    return _read(codes) if host.can_read(codes) else _unread(codes)


def from_additive(attention_mask: Tensor) -> Tokens:
    """The tokens that transformers' layers are told of: (batch, seqlen), < 0 padding, 0 local, > 0 global."""
    codes = torch.where(attention_mask < 0, PADDING, torch.where(attention_mask > 0, GLOBAL, LOCAL))
    return _read(codes) if host.can_read(codes) else _unread(codes)


def _read(codes: Tensor) -> Tokens:
    """By values: what is the same for all rows, and what needs no mask, costs nothing later."""
    values, device = codes.cpu(), codes.device  # the one wait for the device
    if values.numel() and not (
        int(values.min()) >= PADDING and int(values.max()) <= GLOBAL
    ):  # from a GPU, not yet seen
        got = f"values from {int(values.min())} to {int(values.max())}"
        raise ArgumentError("attention_mask", "values 0, 1 and 2", got, "0 is padding, 1 a token, 2 a global token")
    real, is_global = values != PADDING, values == GLOBAL
    counts = is_global.sum(1)
    room = int(counts.max()) if counts.numel() else 0
    keys = None if bool(real.all()) else _keys(real, device)
    own = Tokens(is_real=None if keys is None else codes != PADDING, keys=keys)
    if not room:
        return own
    positions, holds = _positions(is_global, room)
    is_shared = bool((is_global == is_global[:1]).all())
    columns: Mask
    if is_shared and room <= _FEW:
        columns = Global(tuple(positions[0].tolist()), queries=False)
    else:
        columns = Global((codes[0] if is_shared else codes) == GLOBAL, queries=False)
    placed = positions.to(device), holds.to(device)
    return Tokens(own.is_real, codes == GLOBAL, keys, columns, *placed)


def _unread(codes: Tensor) -> Tokens:
    """Without values: every token may be padding or global."""
    real, is_global = codes != PADDING, codes == GLOBAL
    return Tokens(real, is_global, Dense(real[:, None, None, :]), Global(is_global, queries=False))


def _fixed(codes: Tensor, room: int) -> Tokens:
    """Without values, in shapes that `room` fixes."""
    real, is_global = codes != PADDING, codes == GLOBAL
    fits = (is_global.sum(1) <= room).all()
    if host.can_read(codes) and codes.device.type == "cpu":
        if not bool(fits):
            most = int(is_global.sum(1).max())
            raise ArgumentError("global_capacity", f"at least {most}", room, "that many tokens of a row are global")
    else:
        torch._assert_async(fits, f"a row has more than global_capacity={room} global tokens")
    positions, holds = _positions(is_global, room)
    far = _additive(real)
    near = torch.cat([_additive(holds), _additive(real & ~is_global)], dim=-1)
    return Tokens(real, is_global, positions=positions, holds=holds, near=near, far=far)


def _additive(keep: Tensor) -> Tensor:
    """(batch, keys) -> float32 (batch, 1, 1, keys): 0 where True, else -inf."""
    return torch.zeros_like(keep, dtype=torch.float32).masked_fill(~keep, -torch.inf)[:, None, None, :]


def _positions(is_global: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """(positions, holds) of `Tokens`, in ascending order; every position stands once in a row."""
    order = is_global.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :room]
    return order, is_global.gather(1, order)


def _keys(real: Tensor, device: torch.device) -> Mask:
    """Real keys as lengths where all padding is on one side, else as a row of flags."""
    lengths = real.sum(1)
    place = torch.arange(real.shape[1])
    for side, first in (("right", 0), ("left", real.shape[1] - lengths[:, None])):
        if torch.equal(real, (place >= first) & (place < first + lengths[:, None])):
            return Padding(host.from_values(tuple(lengths.tolist()), device), side)
    return Dense(real.to(device)[:, None, None, :])


def _merge(attention_mask: Tensor | None, global_mask: Tensor | None) -> Tensor:
    if global_mask is None:
        assert attention_mask is not None
        return attention_mask.to(torch.int8)
    marks = global_mask.to(torch.int8) + LOCAL
    return marks if attention_mask is None else attention_mask.to(torch.int8) * marks


def _expect_mask(argument: str, mask: Tensor, batch: int, seqlen: int) -> None:
    if not isinstance(mask, Tensor):
        raise ArgumentTypeError(argument, "a tensor (batch, seqlen)", type(mask).__name__, "wrap it: torch.tensor(...)")
    if tuple(mask.shape) != (batch, seqlen):
        got = f"shape {tuple(mask.shape)}"
        raise ArgumentError(argument, f"shape ({batch}, {seqlen})", got, "one value a token, as the tokenizer gives it")


def _expect_values(argument: str, mask: Tensor, most: int, words: str) -> None:
    """Raise unless all values are whole numbers from 0 to `most`, where they may be read without a wait."""
    if mask.dtype == torch.bool or mask.device.type != "cpu" or not host.can_read(mask):
        return
    wrong = mask[~torch.isin(mask, torch.arange(most + 1).to(mask.dtype))]
    if wrong.numel():
        expected = " and ".join(", ".join(map(str, range(most + 1))).rsplit(", ", 1))
        raise ArgumentError(argument, f"values {expected}", wrong.flatten()[0].item(), words)


def _from_positions(positions: Positions, batch: int, seqlen: int, device: torch.device) -> Tensor:
    """int8 (batch, seqlen): 1 at the positions."""
    rows = [list(row) for row in positions if isinstance(row, Sequence)]
    if not rows:
        rows = [list(positions)] * batch  # type: ignore[arg-type]  # no row among them: they are numbers
    if len(rows) != batch:
        raise ArgumentError("global_tokens", f"{batch} lists, one a row", len(rows), "or one list for all rows")
    mask = torch.zeros(batch, seqlen, dtype=torch.int8)
    for number, row in enumerate(rows):
        for position in row:
            if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position < seqlen:
                got = f"{position!r} in row {number}"
                raise ArgumentError("global_tokens", f"positions from 0 to {seqlen - 1}", got, "count from 0")
            mask[number, position] = 1
    return mask.to(device)
