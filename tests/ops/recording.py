"""A GPU that is not there and writes down what it is asked to launch: kernels are compiled for it, never run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

_numbers = itertools.count(1000, 100)


@dataclass
class Launched:
    """One call of a launcher; addresses stand for tensors."""

    grid: tuple[int, ...]
    stream: int
    function: int
    metadata: Any
    hooks: tuple[Any, ...]
    arguments: Any
    has_tensors: bool

    @property
    def told(self) -> tuple[Any, ...]:
        """Everything but how tensors were handed over and who watched."""
        return self.grid, self.stream, self.function, self.metadata, self.arguments


def addresses(value: Any) -> Any:
    """The value with addresses for tensors, and what the launcher reads of a descriptor."""
    if isinstance(value, tuple | list):
        return tuple(addresses(part) for part in value)
    if hasattr(value, "base"):
        return ("descriptor", value.base.data_ptr(), tuple(value.shape), tuple(value.strides), value.padding)
    return value.data_ptr() if isinstance(value, Tensor) else value


def any_tensor(value: Any) -> bool:
    return any(map(any_tensor, value)) if isinstance(value, tuple | list) else isinstance(value, Tensor)


@dataclass
class Recorder:
    """The driver: a GPU of one capability; `device` is a number of its own, by which Triton keeps kernels."""

    arch: int = 90
    device: int = field(default_factory=lambda: next(_numbers))
    stream: int = 77
    launched: list[Launched] = field(default_factory=list)
    num_loaded: int = 0

    def __post_init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda device: {"max_shared_mem": 232_448}
        )

    def _load(self, name: str, *binary: Any) -> tuple[Any, ...]:
        self.num_loaded += 1
        return name, 1000 + self.num_loaded, 32, 0, 1024  # module, function, registers, spills, threads

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        def launch(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
            for hook in (enter, leave):
                if hook is not None:
                    hook(launch_metadata)
            told = addresses(arguments)
            self.launched.append(
                Launched((x, y, z), stream, function, metadata, (enter, leave), told, any_tensor(arguments))
            )

        return launch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_device_interface(self) -> Any:
        return torch.cuda


@contextmanager
def recording() -> Iterator[Recorder]:
    """Triton launches on a Recorder in here."""
    previous, recorder = driver._active, Recorder()
    driver.set_active(recorder)
    try:
        yield recorder
    finally:
        driver._active = previous
