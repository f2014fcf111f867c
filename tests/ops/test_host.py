"""Host copies of small tensors: made once, forgotten with the tensor, never taken of a tensor that was written to."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.errors import ArgumentError
from hasten.ops import host


class Reads(TorchDispatchMode):
    """Counts how often a value leaves a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_copy_has_the_values_in_order() -> None:
    assert host.host_copy(torch.tensor([0, 3, 7], dtype=torch.int32)) == (0, 3, 7)
    assert host.host_copy(torch.tensor([[0, 3], [1, 2]])) == (0, 3, 1, 2)
    assert host.host_copy(torch.tensor([], dtype=torch.int32)) == ()
    assert host.host_copy(torch.arange(6).view(2, 3).T) == (0, 3, 1, 4, 2, 5)


def test_what_is_derived_is_made_once_for_each_key() -> None:
    tensor, made = torch.zeros(3), []

    def make(value: str) -> str:
        made.append(value)
        return value

    for _ in range(3):
        assert host.derived(tensor, "one", lambda: make("first")) == "first"
        assert host.derived(tensor, ("two", 5), lambda: make("second")) == "second"
    assert made == ["first", "second"]
    assert host.derived(torch.zeros(3), "one", lambda: make("third")) == "third", "of another tensor, though equal"


def test_a_write_makes_it_anew() -> None:
    tensor = torch.tensor([0, 2, 5])
    assert host.host_copy(tensor) == (0, 2, 5)
    tensor[1] = 4
    assert host.host_copy(tensor) == (0, 4, 5)
    view = tensor[2:]
    view += 1
    assert host.host_copy(tensor) == (0, 4, 6), "a write through a view counts"


def test_inference_tensors_are_read_each_time() -> None:
    with torch.inference_mode():
        tensor = torch.tensor([0, 2])
        assert host.host_copy(tensor) == (0, 2)
        tensor[1] = 3
        assert host.host_copy(tensor) == (0, 3)


def test_nothing_is_kept_after_the_tensor() -> None:
    class Value:
        pass

    tensor, value = torch.zeros(3), Value()
    alive = weakref.ref(value)
    host.derived(tensor, "value", lambda value=value: value)
    before = len(host._kept)
    del value
    assert alive() is not None
    del tensor
    gc.collect()
    assert alive() is None and len(host._kept) == before - 1


def test_a_number_used_again_by_another_tensor_is_not_confused() -> None:
    for value in range(200):  # tensors that die at once take each other's place in memory
        assert host.host_copy(torch.tensor([value])) == (value,)


def test_known_values_need_no_reading() -> None:
    tensor = host.from_values((0, 4, 9), torch.device("cpu"))
    assert tensor.dtype == torch.int32 and tensor.tolist() == [0, 4, 9]
    with Reads() as reads:
        assert host.host_copy(tensor) == (0, 4, 9)
    assert reads.count == 0


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_second_copy_does_not_wait_for_the_gpu() -> None:
    tensor = torch.tensor([0, 4, 9], device="cuda")
    assert host.host_copy(tensor) == (0, 4, 9)
    try:
        torch.cuda.set_sync_debug_mode("error")
        assert host.host_copy(tensor) == (0, 4, 9)
        host.check_cu_seqlens("cu_seqlens_q", tensor, 9, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_nothing_is_read_while_a_graph_is_captured() -> None:
    tensor = torch.tensor([5, 4, 9], device="cuda")
    assert host.can_read(tensor)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        tensor.add(1)  # PyTorch warns of an empty graph
        assert not host.can_read(tensor)
        host.check_cu_seqlens("cu_seqlens_q", tensor, 9, 5)


def test_nothing_is_read_while_compiling() -> None:
    def function(tensor: Tensor) -> Tensor:
        return tensor + (1 if host.can_read(tensor) else 2)

    tensor = torch.zeros(2)
    assert torch.equal(function(tensor), torch.ones(2))
    assert torch.equal(torch.compile(function, backend="eager", fullgraph=True)(tensor), torch.full((2,), 2.0))


@pytest.mark.parametrize("values", [(0, 3, 7), (0, 0, 7, 7), (0, 7), (0, 1, 2, 3, 4, 5, 6, 7)])
def test_lengths_that_rise_pass(values: tuple[int, ...]) -> None:
    host.check_cu_seqlens("cu_seqlens_q", torch.tensor(values), 7, 7)
    host.check_cu_seqlens("cu_seqlens_q", torch.tensor([0]), 0, 0)


@pytest.mark.parametrize(
    ("values", "longest", "message"),
    [
        ((1, 7), 7, "cu_seqlens_k: expected 0 first and 7 last, got 1 and 7"),
        ((0, 6), 7, "cu_seqlens_k: expected 0 first and 7 last, got 0 and 6"),
        ((0, 8), 8, "cu_seqlens_k: expected 0 first and 7 last, got 0 and 8"),
        ((0, 5, 4, 7), 7, "cu_seqlens_k: expected values that never fall, got 5 then 4 at 1"),
        ((0, 2, 7), 4, "max_seqlen_k: expected at least the longest sequence, 5, got 4"),
    ],
)
def test_lengths_that_do_not_are_refused_each_time(values: tuple[int, ...], longest: int, message: str) -> None:
    tensor = torch.tensor(values)
    for _ in range(2):
        with pytest.raises(ArgumentError) as error:
            host.check_cu_seqlens("cu_seqlens_k", tensor, 7, longest)
        assert str(error.value).startswith(message)
