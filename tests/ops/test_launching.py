"""Launches that skip Triton tell the kernel what Triton would, and know when they may not skip it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

import triton
import triton.language as tl
from triton import knobs

from hasten.ops import launching
from hasten.ops.launching import TENSOR, Described, Launch
from tests.ops.recording import Recorder, recording

pytestmark = pytest.mark.compiler


@triton.jit
def scaled(x_ptr, y_ptr, bias, pair, scale, strides, n, BLOCK: tl.constexpr, EVEN: tl.constexpr = False):
    at = tl.arange(0, BLOCK)
    value = tl.load(x_ptr + at * strides[0], mask=at < n) * scale
    if bias is not None:
        value += tl.load(bias + at)
    if pair is not None:
        value += tl.load(pair[0] + at) * pair[1]
    tl.store(y_ptr + at * strides[1], value, mask=at < n)


@triton.jit
def moved(source, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at[:, None] * BLOCK + at[None, :], source.load([0, 0]))


@pytest.fixture
def gpu():
    with recording() as recorder:
        yield recorder


def plain(n: int = 32, strides: tuple[int, int] = (1, 1), pair: Any = None) -> Launch:
    return Launch(scaled, (3,), (TENSOR, TENSOR, TENSOR, pair, 0.5, strides, n), {"BLOCK": 32, "num_warps": 1})


def floats(count: int = 64, offset: int = 0) -> Tensor:
    """Floats whose address is a multiple of 16, or off by `offset` of them."""
    memory = torch.zeros(count + 8)
    first = (-memory.data_ptr() // 4) % 4
    return memory[first + offset : first + offset + count]


def ways(launch: Launch, gpu: Recorder, *tensors: Tensor | None) -> list[bool]:
    """For three launches, whether each went through Triton (which hands tensors on, not addresses)."""
    before = len(gpu.launched)
    for _ in range(3):
        launch(*tensors)
    return [launched.has_tensors for launched in gpu.launched[before:]]


PLAIN_ONCE = [True, False, False]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_pair", [False, True])
@pytest.mark.parametrize("n", [1, 16, 33, 1 << 40])
def test_the_second_launch_tells_what_the_first_told(has_bias: bool, has_pair: bool, n: int, gpu: Recorder) -> None:
    launch = plain(n, (1, 16), (TENSOR, 2.0) if has_pair else None)
    tensors = [floats(), floats(), floats() if has_bias else None, *([floats()] if has_pair else [])]
    assert ways(launch, gpu, *tensors) == PLAIN_ONCE
    first, second, third = gpu.launched
    assert first.told == second.told == third.told
    assert first.grid == (3, 1, 1) and first.arguments[-2:] == (32, False), "options and defaults are in place"
    others = [None if tensor is None else floats() for tensor in tensors]
    launch(*others)
    with_new = gpu.launched[-1]
    assert not with_new.has_tensors and with_new.arguments[1] == others[1].data_ptr()


def test_addresses_off_by_less_than_16_bytes_are_another_kind(gpu: Recorder) -> None:
    launch, x, y = plain(), floats(), floats()
    assert ways(launch, gpu, x, y, None) == PLAIN_ONCE
    aligned = gpu.launched[-1].function
    assert ways(launch, gpu, floats(offset=1), y, None) == PLAIN_ONCE, "was never compiled"
    assert gpu.launched[-1].function != aligned
    assert ways(launch, gpu, x, floats(offset=2), None) == PLAIN_ONCE
    assert ways(launch, gpu, x, y, None) == [False] * 3 and gpu.launched[-1].function == aligned


def test_dtypes_and_what_is_none_are_other_kinds(gpu: Recorder) -> None:
    launch = plain()
    for tensors in ((floats(), floats(), None), (floats(), floats(), floats()), (floats().half(), floats(), None)):
        assert ways(launch, gpu, *tensors) == PLAIN_ONCE
    assert len({launched.function for launched in gpu.launched}) == 3


def test_another_device_is_another_kind_and_a_stream_is_not(gpu: Recorder) -> None:
    launch, tensors = plain(), (floats(), floats(), None)
    assert ways(launch, gpu, *tensors) == PLAIN_ONCE
    gpu.stream = 78
    assert ways(launch, gpu, *tensors) == [False] * 3 and gpu.launched[-1].stream == 78
    gpu.device += 1
    assert ways(launch, gpu, *tensors) == PLAIN_ONCE
    gpu.device -= 1
    assert ways(launch, gpu, *tensors) == [False] * 3


def test_the_oldest_kinds_are_forgotten(gpu: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_MOST_KINDS", 2)
    launch, tensors = plain(), (floats(), floats(), None)
    devices = [gpu.device + number for number in range(3)]
    for device in devices:
        gpu.device = device
        assert ways(launch, gpu, *tensors) == PLAIN_ONCE
        assert len(launch._kinds) <= 2
    gpu.device = devices[0]
    assert ways(launch, gpu, *tensors) == PLAIN_ONCE
    gpu.device = devices[2]
    assert ways(launch, gpu, *tensors) == [False] * 3


@pytest.mark.parametrize("which", ["enter", "exit", "replaced", "kernel"])
def test_who_watches_launches_sees_each(which: str, gpu: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, tensors, seen = plain(), (floats(), floats(), None), []
    assert ways(launch, gpu, *tensors) == PLAIN_ONCE

    def watch(*arguments: Any, **options: Any) -> None:
        seen.append(arguments)

    if which == "replaced":
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", watch)
    elif which == "kernel":
        monkeypatch.setattr(scaled, "pre_run_hooks", [watch])
    else:
        monkeypatch.setattr(getattr(knobs.runtime, f"launch_{which}_hook"), "calls", [watch])
    assert ways(launch, gpu, *tensors) == [True] * 3 and len(seen) == 3
    monkeypatch.undo()
    assert ways(launch, gpu, *tensors) == [False] * 3 and len(seen) == 3


def test_debugging_goes_through_triton(gpu: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, tensors = plain(), (floats(), floats(), None)
    assert ways(launch, gpu, *tensors) == PLAIN_ONCE
    monkeypatch.setattr(knobs.runtime, "debug", True)
    assert ways(launch, gpu, *tensors) == [True] * 3


@pytest.mark.parametrize("version", ["3.5.1", "3.8.0", "3.60.0", "4.0.0"])
def test_another_triton_is_always_asked(version: str, gpu: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert ways(plain(), gpu, floats(), floats(), None) == [True] * 3


def test_only_kernels_compiled_for_nvidia_are_known(gpu: Recorder) -> None:
    compiled = scaled[(1,)](floats(), floats(), None, None, 0.5, (1, 1), 8, BLOCK=32)
    assert launching.is_known(scaled, compiled)
    assert not launching.is_known(scaled, None), "a test that stands in for the compiler"
    assert not launching.is_known(lambda: None, compiled), "an autotuner"
    metadata = SimpleNamespace(target=SimpleNamespace(backend="hip"))
    other = object.__new__(type(compiled))
    other.metadata = metadata
    assert not launching.is_known(scaled, other)


def test_a_kernel_that_is_not_compiled_is_called_as_it_is() -> None:
    """The interpreter's: no driver is asked for anything."""
    calls: list[Any] = []

    class Interpreted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: calls.append((grid, arguments, options))

    x = floats()
    launch = Launch(Interpreted(), (2, 3), (TENSOR, (1, TENSOR), 5), {"BLOCK": 8})
    for _ in range(2):
        launch(x, None)
    assert calls == [((2, 3), (x, (1, None), 5), {"BLOCK": 8})] * 2


def test_descriptors_are_made_of_the_tensor_at_hand(gpu: Recorder) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    made = []

    def make(tensor: Tensor) -> TensorDescriptor:
        made.append(tensor)
        return TensorDescriptor(tensor, [32, 32], [32, 1], [16, 16])

    launch = Launch(moved, (1,), (Described(make), TENSOR), {"BLOCK": 16})
    for _ in range(3):
        source = floats(1024)
        launch(source, floats(1024))
        kind, address, *rest = gpu.launched[-1].arguments[0]
        assert (kind, address, rest) == ("descriptor", source.data_ptr(), [(32, 32), (32, 1), "zero"])
    assert len(made) == 1 and not gpu.launched[-1].has_tensors


def test_no_tensor_is_kept(gpu: Recorder) -> None:
    import gc
    import weakref

    launch, x = plain(pair=(TENSOR, 2.0)), floats()
    alive = weakref.ref(x)
    ways(launch, gpu, x, floats(), floats(), floats())
    gpu.launched.clear()
    del x
    gc.collect()
    assert alive() is None


def test_threads_may_launch_at_once(gpu: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_MOST_KINDS", 2)
    launch, wrong = plain(), []
    kinds = [(floats(offset=a), floats(offset=b), c) for a in (0, 1) for b in (0, 1) for c in (None, floats())]
    for tensors in kinds:
        launch(*tensors)

    def work() -> None:
        try:
            for number in range(200):
                launch(*kinds[number % len(kinds)])
        except RuntimeError as problem:
            wrong.append(problem)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(gpu.launched) == len(kinds) + 4 * 200
