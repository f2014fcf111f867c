"""Plans of the portable kernels: kept by all they depend on, and launched as Triton itself would launch."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

import hasten
from hasten.masks import Causal, Global, Padding, Window
from hasten.ops.call import Call
from hasten.ops.portable import launch, plans, table
from tests.ops.portable.compiling import SHARED_LIMIT
from tests.ops.recording import Recorder, recording

LONGFORMER = Window(3, 3) | Global((0,))
TERMS: dict[str, dict[str, Any]] = {
    "causal": {"mask": Causal()},
    "padded sinks": {"mask": Causal() & Padding([40, 64]), "sinks": torch.empty(4)},
    "lists bias": {"mask": LONGFORMER, "bias": torch.empty(1, 4, 1, 64)},
    "dropout alibi": {
        "mask": Causal(),
        "seed": torch.zeros(1, dtype=torch.int64),
        "dropout_p": 0.1,
        "slopes": torch.empty(1, 4),
    },
}
SHARED = {"softmax_scale": 0.125, "max_seqlen_q": 64, "max_seqlen_k": 64}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "limits", lambda device: table.Limits(90, SHARED_LIMIT[90]))
    with recording() as recorder:
        yield recorder


def tensors(layout: str = "apart", batch: int = 2, seqlen: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    if layout == "apart":
        return tuple(torch.zeros(batch, seqlen, 4, 16, dtype=torch.bfloat16) for _ in range(3))
    return torch.zeros(batch, seqlen, 3, 4, 16, dtype=torch.bfloat16).unbind(2)


def once(qkv: tuple[Tensor, ...], call: Call) -> None:
    out, lse = launch.forward(*qkv, call)
    launch.backward(torch.zeros_like(out), torch.zeros_like(lse), *qkv, out, lse, call)


def without_addresses(value: Any) -> Any:
    """The arguments of a launch with "tensor" for each address (outputs are allocated anew each time)."""
    if isinstance(value, tuple):
        return tuple(map(without_addresses, value))
    return "tensor" if isinstance(value, int) and value > 1 << 32 else value


@pytest.mark.compiler
@pytest.mark.parametrize("terms", TERMS)
def test_a_second_call_tells_the_kernels_what_the_first_told(terms: str, gpu: Recorder) -> None:
    plans.clear()
    call, qkv = Call(**SHARED, **TERMS[terms]), tensors("together")
    once(qkv, call)
    first = list(gpu.launched)
    assert len(first) == (5 if "bias" in terms else 4) and all(launched.has_tensors for launched in first)
    once(qkv, call)
    second = gpu.launched[len(first) :]
    assert not any(launched.has_tensors for launched in second)
    for one, other in zip(first, second, strict=True):
        assert without_addresses(one.told) == without_addresses(other.told)
        inputs = {tensor.data_ptr() for tensor in qkv if tensor.data_ptr() in flat(one.arguments)}
        assert inputs == {tensor.data_ptr() for tensor in qkv if tensor.data_ptr() in flat(other.arguments)}
        positions = [flat(one.arguments).index(address) for address in inputs]
        assert all(flat(other.arguments)[place] == flat(one.arguments)[place] for place in positions)


def flat(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, tuple) else [value]


@pytest.mark.compiler
def test_a_change_of_any_kind_is_told_to_the_kernels(gpu: Recorder) -> None:
    """Each call differs from the one before it in one thing; what is launched equals a launch without any plan."""
    plans.clear()
    call = Call(**SHARED, mask=Causal())
    longer = {"softmax_scale": 0.125, "max_seqlen_q": 80, "max_seqlen_k": 80}
    calls = [
        (tensors(), call),
        (tensors("together"), call),
        (tensors("together"), Call(**SHARED, mask=Window(5, 0))),
        (tensors("together"), Call(**SHARED, mask=Window(5, 0), softcap=3.0)),
        (tensors("together", batch=3), call),
        (tensors(seqlen=80), Call(**longer, mask=Causal())),
        (tensors(), Call(**(SHARED | {"softmax_scale": 0.5}), mask=Causal())),
    ]
    for qkv, own in calls * 2:
        launch.forward(*qkv, own)
    kept = [without_addresses(launched.told) for launched in gpu.launched]
    assert kept[: len(calls)] == kept[len(calls) :] and not any(one.has_tensors for one in gpu.launched[len(calls) :])
    gpu.launched.clear()
    for qkv, own in calls:
        plans.clear()
        launch.forward(*qkv, own)
    assert kept[: len(calls)] == [without_addresses(launched.told) for launched in gpu.launched]
    assert len(set(map(str, kept))) == len(calls)


@pytest.mark.compiler
def test_a_new_line_of_the_table_is_taken_at_once(gpu: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner writes lines between calls."""
    call, qkv = Call(**SHARED, mask=Causal()), tensors()
    launch.forward(*qkv, call)
    monkeypatch.setitem(table.TABLE, ("forward", 2, 64), {"plain": table.Tile(32, 32, 4, 1)})
    launch.forward(*qkv, call)
    assert gpu.launched[0].grid != gpu.launched[1].grid


@pytest.mark.compiler
def test_plans_are_bounded(gpu: Recorder) -> None:
    for plan in plans.KEPT:
        assert plan.cache_info().maxsize is not None
    qkv = tensors()
    plans.clear()
    for number in range(5):
        plans.Sizes.of(*qkv, Call(**(SHARED | {"softmax_scale": 1.0 + number}), mask=Causal()))
    assert plans.forward.cache_info().currsize == 0, "sizes alone plan nothing"


def changed(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose strides or alignment differ from step to step, all with the same values."""
    values = torch.randn(3, 2, 65, 4, 32, generator=torch.Generator().manual_seed(3)).cuda().bfloat16()
    if step == 0:
        return values.unbind(0)
    if step == 1:
        return values.permute(1, 2, 0, 3, 4).contiguous().unbind(2)
    if step == 2:  # heads first
        return values.transpose(2, 3).contiguous().transpose(2, 3).unbind(0)
    memory = torch.empty(values.numel() + step, dtype=values.dtype, device="cuda")
    return memory[step:].view(values.shape).copy_(values).unbind(0)  # off by 2 * step bytes


def solved(qkv: tuple[Tensor, ...], **terms: Any) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    out, lse = hasten.attention(*leaves, return_lse=True, implementation="portable", **terms)
    loss = (out.float() * torch.arange(out.shape[-1], device="cuda")).sum() + lse.sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [Causal(), LONGFORMER, Causal() & Padding([65, 30])], ids=str)
def test_fast_and_plain_launches_give_the_same_bits(mask: hasten.masks.Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.ops import launching

    terms: dict[str, Any] = {"mask": mask, "sinks": torch.zeros(4, device="cuda")}
    with monkeypatch.context() as patch:
        patch.setattr(launching, "is_watched", lambda kernel: True)
        want = [solved(changed(step), **terms) for step in range(5)]
    for step in (0, 1, 2, 3, 4, 0, 4, 1, 3, 2):
        for _ in range(2):
            for have, exact in zip(solved(changed(step), **terms), want[step], strict=True):
                assert torch.equal(have, exact), step


@pytest.mark.gpu
def test_a_graph_captured_from_fast_launches_replays() -> None:
    q, k, v = changed(0)
    want = solved((q, k, v), mask=Causal())[0]
    held = {}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        held["out"] = hasten.attention(q, k, v, Causal(), implementation="portable")
    held["out"].zero_()
    graph.replay()
    assert torch.equal(held["out"], want)


def host_us(work: Any, num_calls: int = 200, rounds: int = 5) -> float:
    """Microseconds of the host for a call, the least of some rounds; the GPU's queue never fills."""
    for _ in range(20):
        work()
    least = float("inf")
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(num_calls):
            work()
        least = min(least, (time.perf_counter() - begin) / num_calls * 1e6)
    return least


@pytest.mark.gpu
def test_a_launch_costs_little_on_the_host() -> None:
    """About 20 us a launch where it was 70; the bound leaves room for a slow and busy host."""
    q, k, v = (torch.zeros(1, 64, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    call = Call(**SHARED, mask=Causal())
    out, lse = launch.forward(q, k, v, call)
    assert host_us(lambda: launch.forward(q, k, v, call)) < 60
    assert host_us(lambda: launch.backward(out, None, q, k, v, out, lse, call)) < 3 * 60
    with torch.no_grad():
        assert host_us(lambda: hasten.attention(q, k, v, Causal(), implementation="portable")) < 120
