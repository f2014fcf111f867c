"""Small integer tensors on the host: read once for each tensor, checked once, never when it would be unsafe.

Reading a GPU tensor waits for the GPU. cu_seqlens are made once and used by every layer, so the copy is
kept for as long as the tensor lives and is not written to.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from hasten.errors import ArgumentError

_T = TypeVar("_T")
_kept: dict[int, tuple[weakref.ref[Tensor], int, dict[Hashable, Any]]] = {}


def derived(tensor: Tensor, key: Hashable, make: Callable[[], _T]) -> _T:
    """make(), kept under `key` until the tensor dies or is written to.

    Inference tensors do not count their writes, so nothing is kept for them.
    """
    if tensor.is_inference():
        return make()
    number = id(tensor)
    entry = _kept.get(number)
    if entry is None or entry[0]() is not tensor or entry[1] != tensor._version:
        entry = (weakref.ref(tensor, partial(_forget, _kept, number)), tensor._version, {})
        _kept[number] = entry
    if key not in entry[2]:
        entry[2][key] = make()
    value: _T = entry[2][key]
    return value


def _forget(kept: dict[int, Any], number: int, _: object) -> None:
    kept.pop(number, None)  # by argument, for a tensor may outlive the globals of this module


def host_copy(tensor: Tensor) -> tuple[int, ...]:
    """The values of an integer tensor, flattened."""
    return derived(tensor, "values", lambda: tuple(int(value) for value in tensor.flatten().tolist()))


def from_values(values: tuple[int, ...], device: torch.device) -> Tensor:
    """An int32 vector on `device` whose host copy is known without reading it back."""
    tensor = torch.tensor(values, dtype=torch.int32, device=device)
    derived(tensor, "values", lambda: values)
    return tensor


def can_read(tensor: Tensor) -> bool:
    """False while tracing and while a CUDA graph is captured: then contents must not be looked at."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def check_cu_seqlens(argument: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    """Raise ArgumentError unless it rises from 0 to `total` in steps of at most `max_seqlen`."""
    if can_read(cu_seqlens):
        passed = ("rises", argument, total, max_seqlen)
        derived(cu_seqlens, passed, lambda: _expect_rising(argument, host_copy(cu_seqlens), total, max_seqlen))


def _expect_rising(argument: str, values: tuple[int, ...], total: int, max_seqlen: int) -> None:
    if values[0] != 0 or values[-1] != total:
        raise ArgumentError(argument, f"0 first and {total} last", f"{values[0]} and {values[-1]}", "it counts tokens")
    steps = [after - before for before, after in itertools.pairwise(values)]
    if min(steps, default=0) < 0:
        where = next(number for number, step in enumerate(steps) if step < 0)
        got = f"{values[where]} then {values[where + 1]} at {where}"
        raise ArgumentError(argument, "values that never fall", got, "use a cumulative sum of lengths")
    if max(steps, default=0) > max_seqlen:
        name = argument.replace("cu_seqlens", "max_seqlen")
        raise ArgumentError(name, f"at least the longest sequence, {max(steps)}", max_seqlen, "or leave it out")
