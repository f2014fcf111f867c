"""Launching a Triton kernel again without asking Triton what to do.

`JITFunction.run` looks at each argument of each launch to find the compiled kernel. A `Launch` fixes all arguments
but the tensors, so that only what of the tensors concerns the compiler is left to look at: which are None, dtypes,
and whether an address is a multiple of 16. The first launch of each kind goes through Triton and is the definition;
the ones after it hand the same arguments to the kernel that Triton compiled. Used by every folder of Triton kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton import knobs
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

#: stands for a tensor (or None) in the arguments of a `Launch`.
TENSOR = object()

#: versions whose CompiledKernel.run(grid x 3, stream, function, metadata, launch metadata, hooks x 2, *arguments)
#: was read and tested; any other is launched the plain way. 3.7: with a driver that records, not yet on a GPU.
KNOWN_VERSIONS = ("3.6.", "3.7.")

_MOST_KINDS = 32


@dataclass(frozen=True)
class Described:
    """Stands for a tensor that the kernel takes as a descriptor: `make` gives the one of Triton or Gluon.

    Shape, strides, block and layout of what it makes must follow from what is fixed, not from the tensor at hand.
    """

    make: Callable[[Tensor], Any]


class Launch:
    """One kernel with its grid and all arguments but the tensors; call it with the tensors.

    `arguments` are the positional ones of the kernel, TENSOR or Described where a tensor comes, also inside tuples;
    `options` are those by name, for the kernel and the compiler. They must never change, and they hold no tensor.
    Launches on the current device and stream; may be called from several threads and while a CUDA graph is captured.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._kernel = kernel
        self._is_compiled = isinstance(kernel, JITFunction)  # not so under the interpreter
        self._grid = grid
        self._arguments = arguments
        # said, because from triton 3.10 on a multiplication and an addition are fused for those who ask
        self._options = {"enable_fp_fusion": True, **options} if self._is_compiled else options
        self._kinds: dict[tuple[Any, ...], _Ready] = {}
        self._lock = threading.Lock()

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch with the tensors that take the places of TENSOR and Described, in order."""
        if not self._is_compiled:
            self._launch_plainly((), tensors)
            return
        active = driver.active
        device = active.get_current_device()
        values: list[Any] = []
        kind: list[Any] = [device]
        for tensor in tensors:
            if tensor is None:
                values.append(None)
                kind.append(None)
            else:
                pointer = tensor.data_ptr()
                values.append(pointer)
                kind += (tensor.dtype, pointer % 16 == 0)
        key = tuple(kind)
        ready = self._kinds.get(key)
        if ready is None or is_watched(self._kernel):
            self._launch_plainly(key, tensors)
            return
        for place, kind_of, fields in ready.descriptors:  # its checks, which passed once, cost 5 us
            values[place] = descriptor = object.__new__(kind_of)
            descriptor.__dict__.update(fields, base=tensors[place])
        rest = ready.rest
        if ready.nested:
            inner = iter(values[ready.num_leading :])
            del values[ready.num_leading :]
            rest = tuple(_filled(v, inner) if i in ready.nested else v for i, v in enumerate(rest))
        ready.run(*ready.start, active.get_current_stream(device), *ready.kernel, None, None, None, *values, *rest)

    def _launch_plainly(self, key: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> None:
        made = [
            place.make(tensor) if isinstance(place, Described) and tensor is not None else tensor
            for place, tensor in zip(_places(self._arguments), tensors, strict=True)
        ]
        compiled = self._kernel[self._grid](*_filled(self._arguments, iter(made)), **self._options)
        if self._is_compiled and key not in self._kinds and is_known(self._kernel, compiled):
            ready = self._ready(compiled, made)
            with self._lock:
                while len(self._kinds) >= _MOST_KINDS:
                    del self._kinds[next(iter(self._kinds))]
                self._kinds[key] = ready

    def _ready(self, compiled: CompiledKernel, made: list[Any]) -> _Ready:
        """What a launch like the one just made needs, besides addresses."""
        signature = self._kernel.signature
        named = {name: value for name, value in self._options.items() if name in signature.parameters}
        bound = signature.bind(*self._arguments, **named)
        bound.apply_defaults()
        every = tuple(bound.arguments.values())  # of the parameters in order, which is what Triton hands on
        num_leading = next((number for number, value in enumerate(every) if not _is_place(value)), len(every))
        rest = every[num_leading:]
        return _Ready(
            run=compiled.run,
            start=(*self._grid, 1, 1)[:3],
            kernel=(compiled.function, compiled.packed_metadata),
            num_leading=num_leading,
            rest=rest,
            nested=frozenset(number for number, value in enumerate(rest) if any(_places((value,)))),
            descriptors=tuple(
                (place, type(value), {**vars(value), "base": None})
                for place, value in enumerate(made)
                if value is not None and not isinstance(value, Tensor)
            ),
        )


class _Ready(NamedTuple):
    """A compiled kernel, and its arguments after the leading tensors: fixed but for those numbered in `nested`."""

    run: Callable[..., None]
    start: tuple[int, ...]
    kernel: tuple[Any, Any]
    num_leading: int
    rest: tuple[Any, ...]
    nested: frozenset[int]
    descriptors: tuple[tuple[int, type[Any], dict[str, Any]], ...]


def is_known(kernel: Any, compiled: Any) -> bool:
    """Whether Triton is one whose compiled kernels may be launched by us: its version, its kernels, NVIDIA.

    Not so under the interpreter, for autotuned kernels, and where a test stands in for the compiler.
    """
    return (
        triton.__version__.startswith(KNOWN_VERSIONS)
        and isinstance(kernel, JITFunction)
        and isinstance(compiled, CompiledKernel)
        and compiled.metadata.target.backend == "cuda"
    )


def is_watched(kernel: Any) -> bool:
    """Whether someone, such as a profiler, wants to see each launch, which only Triton itself can show."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
        or kernel.pre_run_hooks
        or runtime.debug
    )


def _is_place(value: Any) -> bool:
    return value is TENSOR or isinstance(value, Described)


def _places(arguments: tuple[Any, ...]) -> Iterator[Any]:
    """The places of tensors, in order."""
    for value in arguments:
        if _is_place(value):
            yield value
        elif isinstance(value, tuple):
            yield from _places(value)


def _filled(value: Any, tensors: Iterator[Any]) -> Any:
    """The value with tensors in those places."""
    if _is_place(value):
        return next(tensors)
    return tuple(_filled(part, tensors) for part in value) if isinstance(value, tuple) else value
