"""Attention as PyTorch sees it: registered operators, torch.compile, autocast, checkpointing, subsets, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import hasten
from hasten.masks import Causal, Full, Global, Mask, Padding, Window
from hasten.ops import choose, operators
from hasten.ops.call import Call, Gradients
from tests.ops import tables
from tests.ops.cases import Case, Problem, call, make, solve

pytestmark = [
    # the interpreter of triton 3.6 on numpy 2, and what numpy says of infinities that are meant
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

SMALL = {"seqlen_q": 9, "seqlen_k": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
CASES = [
    Case(name="full", **SMALL),
    Case(name="causal", batch=2, mask=tables.CAUSAL, **SMALL),
    Case(name="longformer", mask=tables.fixed(Window(2, 2) | Global((0,))), **SMALL),
    Case(name="padding", batch=2, mask=tables.both(tables.CAUSAL, tables.padding(12, 5)), **SMALL),
    Case(name="head-dim-v", head_dim_v=24, **SMALL),
    Case(name="packed", lengths=((3, 5), (0, 2), (6, 4)), mask=tables.CAUSAL, num_heads=4, num_kv_heads=2),
    Case(name="sinks-softcap", has_sinks=True, softcap=2.0, **SMALL),
    Case(name="bias", bias="h1k", **SMALL),
    Case(name="alibi", alibi="h", **SMALL),
    Case(name="dropout", dropout_p=0.3, **SMALL),
    Case(name="lse", upstream="both", **SMALL),
    Case(name="heads-first", layout="heads_first", dout_layout="ones", **SMALL),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
WHERE = pytest.mark.parametrize(
    ("implementation", "device"),
    [
        ("blockwise", "cpu"),
        pytest.param("portable", "cpu", marks=pytest.mark.interpreter),
        pytest.param("portable", "cuda", marks=pytest.mark.gpu),
    ],
)


class Operators(TorchDispatchMode):
    """Records the calls of hasten's operators: (operator, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "hasten":
            self.calls.append((func, (*args, *(kwargs or {}).values())))
        return func(*args, **(kwargs or {}))


def recorded(case: Case, implementation: str, device: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The operators that one forward and backward call, by name, with their arguments."""
    problem = make(case, torch.float32, device)
    with Operators() as recorder:
        solve(problem, lambda own: call(own, implementation))
    return {func.__name__: (func, tuple(without_history(value) for value in args)) for func, args in recorder.calls}


def without_history(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def leaf(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().clone(memory_format=torch.preserve_format).requires_grad_() if is_float else value


@pytest.mark.parametrize(
    ("case", "implementation", "device"),
    [
        *(pytest.param(case, "blockwise", "cpu", id=f"{case}-blockwise") for case in CASES),
        *(pytest.param(case, "portable", "cuda", id=f"{case}-cuda", marks=pytest.mark.gpu) for case in CASES),
        *(
            pytest.param(case, "portable", "cpu", id=f"{case}-interpreted", marks=pytest.mark.interpreter)
            for case in CASES
            if case.name in ("padding", "packed", "lse")
        ),
    ],
)
def test_opcheck(case: Case, implementation: str, device: str) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch with dynamic shapes."""
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports it")
    calls = recorded(case, implementation, device)
    assert set(calls) == {"attention.default", "attention_backward.default"}
    func, args = calls["attention.default"]
    torch.library.opcheck(func, tuple(leaf(value) for value in args))
    func, args = calls["attention_backward.default"]
    torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))


@WHERE
@cases
def test_fake_results_have_the_strides_of_real_ones(case: Case, implementation: str, device: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for func, args in recorded(case, implementation, device).values():
        real = func(*args)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake_args = [
                [mode.from_tensor(t) for t in a]
                if isinstance(a, list)
                else mode.from_tensor(a)
                if isinstance(a, Tensor)
                else a
                for a in args
            ]
            fake = func(*fake_args)
        for have, want in zip(fake, real, strict=True):
            assert (have.shape, have.dtype, have.device) == (want.shape, want.dtype, want.device)
            assert have.stride() == want.stride() or want.numel() == 0


MASKS: dict[str, Mask] = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(20, 3),
    "longformer": Window(9, 9) | Global((0, 40)),
    "dilated": Window(4, 4, dilation=3),
}
BACKENDS = pytest.mark.parametrize(
    ("backend", "device"), [("aot_eager", "cpu"), pytest.param("inductor", "cuda", marks=pytest.mark.gpu)]
)


def gradients(function: Callable[..., Tensor], leaves: list[Tensor], *rest: Any) -> list[Tensor]:
    """The output and the gradient of every leaf for a loss that is not linear."""
    leaves = [tensor.detach().requires_grad_() for tensor in leaves]
    out = function(*leaves, *rest)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@BACKENDS
@pytest.mark.parametrize("name", MASKS)
def test_compiled_is_eager(name: str, backend: str, device: str) -> None:
    """Without a graph break, between other operators, forward and backward."""
    torch._dynamo.reset()
    leaves = [torch.randn(2, 70, heads, 32, device=device) for heads in (4, 2, 2)]

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = hasten.attention(2 * q, k.relu(), v, MASKS[name], return_lse=True)
        return out.tanh() + lse.transpose(1, 2)[..., None]

    want, got = gradients(block, leaves), gradients(torch.compile(block, backend=backend, fullgraph=True), leaves)
    for have, exact in zip(got, want, strict=True):
        torch.testing.assert_close(have, exact, rtol=1e-4, atol=1e-4)


@BACKENDS
def test_compiled_packed_is_eager(backend: str, device: str) -> None:
    torch._dynamo.reset()
    bounds = torch.tensor([0, 17, 17, 60, 70], dtype=torch.int32, device=device)
    leaves = [torch.randn(70, heads, 32, device=device) for heads in (4, 2, 2)]

    def block(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        lengths = {f"cu_seqlens_{side}": cu_seqlens for side in "qk"} | {f"max_seqlen_{side}": 43 for side in "qk"}
        return hasten.attention(2 * q, k, v, Causal(), **lengths).tanh()

    compiled = torch.compile(block, backend=backend, fullgraph=True)
    for values in (bounds, torch.tensor([0, 30, 50, 60, 70], dtype=torch.int32, device=device)):
        for have, exact in zip(gradients(compiled, leaves, values), gradients(block, leaves, values), strict=True):
            torch.testing.assert_close(have, exact, rtol=1e-4, atol=1e-4)


@BACKENDS
def test_compiled_features_are_eager(backend: str, device: str) -> None:
    """Sinks, bias, ALiBi, softcap, padding: the terms and the tensors of the mask travel as inputs."""
    torch._dynamo.reset()
    leaves = [torch.randn(2, 40, 4, 16, device=device) for _ in range(3)]
    leaves += [torch.randn(4, device=device), torch.randn(4, 40, 40, device=device), torch.rand(4, device=device)]
    lengths = torch.tensor([40, 23], dtype=torch.int32, device=device)

    def block(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bias: Tensor, slopes: Tensor, lengths: Tensor) -> Tensor:
        first = hasten.attention(q, k, v, Causal() & Padding(lengths), sinks=sinks, bias=bias, softcap=3.0)
        return first + hasten.attention(q, k, first, Causal(), bias=hasten.ALiBi(slopes))

    want = gradients(block, leaves, lengths)
    got = gradients(torch.compile(block, backend=backend, fullgraph=True), leaves, lengths)
    for have, exact in zip(got, want, strict=True):
        torch.testing.assert_close(have, exact, rtol=1e-4, atol=1e-4)


@BACKENDS
def test_a_sweep_of_lengths_is_compiled_once(backend: str, device: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(
        lambda q, k, v: hasten.attention(q, k, v, Causal()), backend=counter, fullgraph=True, dynamic=True
    )
    for seqlen in (17, 33, 64, 65, 100, 128, 129, 200):
        q, k, v = (torch.randn(2, seqlen, 2, 16, device=device, requires_grad=True) for _ in range(3))
        out = compiled(q, k, v)
        torch.testing.assert_close(out, hasten.attention(q, k, v, Causal()), rtol=1e-4, atol=1e-4)
        out.sum().backward()
    assert counter.frame_count <= 2, f"{counter.frame_count} graphs for 8 lengths"


@WHERE
def test_only_what_is_asked_for_has_a_gradient(implementation: str, device: str) -> None:
    """Each subset of inputs that require gradients gets what all of them together get."""
    case = Case(name="subsets", has_sinks=True, bias="1qk", mask=tables.CAUSAL, **SMALL)
    problem = make(case, torch.float32, device)
    everything = solve(problem, lambda own: call(own, implementation))
    names = ["q", "k", "v", "sinks", "bias"]
    for chosen in (["v"], ["bias"], ["sinks"], ["q"], ["k"], ["q", "v"], ["k", "bias"]):
        tensors = {"q": problem.q, "k": problem.k, "v": problem.v, **problem.terms}
        tensors = {name: tensors[name].detach().requires_grad_(name in chosen) for name in names}
        own = Problem(
            case,
            tensors["q"],
            tensors["k"],
            tensors["v"],
            {n: tensors[n] for n in names[3:]},
            problem.mask,
            None,
            problem.dout,
            problem.dlse,
        )
        out, _ = call(own, implementation)
        grads = torch.autograd.grad(out, [tensors[name] for name in chosen], problem.dout)
        for name, grad in zip(chosen, grads, strict=True):
            torch.testing.assert_close(grad, everything[f"d{name}"])
    with torch.no_grad():
        out, lse = call(problem, implementation)
    assert not out.requires_grad and not lse.requires_grad


@WHERE
def test_an_output_without_gradient_adds_none(implementation: str, device: str) -> None:
    problem = make(Case(name="no gradient", **SMALL), torch.float32, device)
    leaves = [t.detach().requires_grad_() for t in (problem.q, problem.k, problem.v)]
    out, lse = hasten.attention(*leaves, return_lse=True, implementation=implementation)
    (dv,) = torch.autograd.grad(lse.sum(), [leaves[2]], retain_graph=True, allow_unused=True)
    assert dv is None or not dv.any(), "lse does not depend on v"
    both = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.zeros_like(lse)), retain_graph=True)
    for have, want in zip(torch.autograd.grad(out, leaves, torch.ones_like(out)), both, strict=True):
        torch.testing.assert_close(have, want)


@WHERE
def test_a_second_gradient_is_refused_and_never_wrong(implementation: str, device: str) -> None:
    q, k, v = (torch.randn(1, 5, 2, 16, device=device, requires_grad=True) for _ in range(3))
    out = hasten.attention(q, k, v, implementation=implementation)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"attention_backward|autograd|differentiable"):
        torch.autograd.grad(dq.square().sum(), q)


def test_the_reference_gives_second_gradients_in_float32_too() -> None:
    q, k, v = (torch.randn(1, 5, 2, 16, requires_grad=True) for _ in range(3))
    out = hasten.attention(q, k, v, implementation="reference")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(dq.square().sum(), q)
    assert second.isfinite().all() and second.any()


@WHERE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_takes_float32_in_as_its_dtype(dtype: torch.dtype, implementation: str, device: str) -> None:
    if device == "cpu" and implementation == "portable" and dtype == torch.bfloat16:
        pytest.skip("the interpreter of triton 3.6 computes bfloat16 wrongly")
    leaves = [torch.randn(1, 17, 2, 16, device=device, requires_grad=True) for _ in range(3)]
    with torch.autocast(device, dtype=dtype):
        out = hasten.attention(*leaves, Causal(), implementation=implementation)
    assert out.dtype == dtype
    halves = [tensor.detach().to(dtype).requires_grad_() for tensor in leaves]
    want = hasten.attention(*halves, Causal(), implementation=implementation)
    assert torch.equal(out, want)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    for have, exact in zip(grads, torch.autograd.grad(want.float().sum(), halves), strict=True):
        assert have.dtype == torch.float32 and torch.equal(have, exact.float())


def test_autocast_joins_dtypes_and_leaves_float64_alone() -> None:
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert hasten.attention(q, k.bfloat16(), v).dtype == torch.bfloat16
        assert hasten.attention(q.double(), k.double(), v.double()).dtype == torch.float64


def test_tensors_without_data_give_shapes() -> None:
    q, k, v = (torch.empty(2, seqlen, heads, 8, device="meta") for seqlen, heads in ((5, 4), (7, 2), (7, 2)))
    out, lse = hasten.attention(q, k, v, Causal(), return_lse=True)
    assert out.shape == (2, 5, 4, 8) and lse.shape == (2, 4, 5) and out.device.type == "meta"


@WHERE
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
def test_checkpointing_changes_nothing(use_reentrant: bool, dropout_p: float, implementation: str, device: str) -> None:
    """The second forward draws the cells of the first: dropout's seed comes from PyTorch's generator."""
    leaves = [torch.randn(1, 30, 2, 16, device=device, requires_grad=True) for _ in range(3)]

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = hasten.attention(q, k, v, Causal(), dropout_p=dropout_p, implementation=implementation)
        return hasten.attention(out, k, v, dropout_p=dropout_p, implementation=implementation)

    torch.manual_seed(7)
    want = torch.autograd.grad(block(*leaves).square().sum(), leaves)
    torch.manual_seed(7)
    out = checkpoint(block, *leaves, use_reentrant=use_reentrant)
    out.square().sum().backward()
    for tensor, exact in zip(leaves, want, strict=True):
        assert torch.equal(tensor.grad, exact)


def captured(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of `step` after a run outside of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.gpu
@pytest.mark.parametrize("name", MASKS)
def test_a_cuda_graph_replays_forward_and_backward(name: str) -> None:
    leaves = [
        torch.randn(2, 70, heads, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)
    ]
    held: dict[str, Any] = {}

    def step() -> None:
        out = hasten.attention(*leaves, MASKS[name])
        # detached: a graph that lives on would tie the leaves to the stream of the first run
        held["all"] = (out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)))

    graph = captured(step)
    with torch.no_grad():
        for tensor in leaves:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    got = [tensor.clone() for tensor in held["all"]]
    step()
    for have, want in zip(got, held["all"], strict=True):
        assert torch.equal(have, want)


@pytest.mark.gpu
def test_a_cuda_graph_follows_lengths_that_change() -> None:
    q, k, v = (torch.randn(70, 2, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    bounds = torch.tensor([0, 40, 60, 70], dtype=torch.int32, device="cuda")
    lengths = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 70, "max_seqlen_k": 70}
    held: dict[str, Tensor] = {}

    def step() -> None:
        held["out"] = hasten.attention(q, k, v, Causal(), **lengths)

    graph = captured(step)
    for values in ([0, 10, 11, 70], [0, 0, 70, 70], [0, 40, 60, 70]):
        bounds.copy_(torch.tensor(values))
        graph.replay()
        got = held["out"].clone()
        assert torch.equal(got, hasten.attention(q, k, v, Causal(), **lengths)), values
        want = hasten.attention(q.double(), k.double(), v.double(), Causal(), implementation="reference", **lengths)
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_dropout_in_a_cuda_graph_draws_new_cells_each_time() -> None:
    q = torch.zeros(1, 64, 2, 16, device="cuda", dtype=torch.bfloat16)
    v = torch.eye(64, device="cuda", dtype=torch.bfloat16)[None, :, None].expand(1, 64, 2, 64)
    held: dict[str, Tensor] = {}

    def step() -> None:
        held["out"] = hasten.attention(q, q, v, dropout_p=0.5)

    graph = captured(step)
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(held["out"].clone() > 0)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert all(0.4 < kept.float().mean() < 0.6 for kept in seen)


@pytest.mark.gpu
def test_the_device_of_the_tensors_counts() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = (torch.randn(1, 33, 2, 32, device="cuda:1", requires_grad=True) for _ in range(3))
    with torch.cuda.device(0):
        out = hasten.attention(q, k, v, Causal())
        out.sum().backward()
    assert out.device == q.device
    want = hasten.attention(q.double(), k.double(), v.double(), Causal(), implementation="reference")
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)


@WHERE
@cases
def test_without_the_dispatcher_nothing_changes(
    case: Case, implementation: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain calls skip it: the same bits as through the operators, and none of them is called."""
    problem = make(case, torch.float32, device)

    def solved() -> dict[str, Tensor]:
        torch.manual_seed(5)  # of dropout
        return solve(problem, lambda own: call(own, implementation))

    with monkeypatch.context() as patch:
        patch.setattr(operators, "is_seen", lambda *tensors: True)
        want = solved()
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.hasten, "attention", None)
        patch.setattr(torch.ops.hasten, "attention_backward", None)
        got = solved()
    for name, exact in want.items():
        assert torch.equal(got[name], exact), name


def test_who_may_see_an_operator_does() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    class Wrapper(Tensor):
        pass

    plain = torch.ones(2)
    assert not operators.is_seen(plain, None, torch.nn.Parameter(plain), plain.view(1, 2).expand(3, 2))
    zeros = torch._efficientzerotensor(2)
    for tensor in (torch.ones(2, device="meta"), torch._neg_view(plain), zeros, plain.as_subclass(Wrapper)):
        assert operators.is_seen(plain, None, tensor)
    for mode in (FakeTensorMode(), FlopCounterMode(display=False), torch.profiler.profile(acc_events=True)):
        with mode:
            assert operators.is_seen(plain)
    seen = []
    for transform in (torch.func.grad, torch.func.vmap):
        transform(lambda tensor: (seen.append(operators.is_seen(tensor)), tensor.sum())[1])(torch.ones(2, 2)[0])
    assert seen == [True, True] and not operators.is_seen(plain)


def test_a_profile_names_the_operators() -> None:
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    with torch.profiler.profile(acc_events=True) as profile:
        hasten.attention(q, q, q, Causal()).sum().backward()
    assert {"hasten::attention", "hasten::attention_backward"} <= {event.name for event in profile.events()}


def test_a_negative_view_is_what_it_shows() -> None:
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    want = hasten.attention(-q, k, v, Causal())
    assert torch.equal(hasten.attention(torch._neg_view(q), k, v, Causal()), want)


def test_tensors_saved_for_backward_pass_the_hooks_of_autograd() -> None:
    """Offloading and the check for writes in place hold for plain calls too."""
    leaves = [torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3)]
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(t), t.clone())[1], lambda t: t):
        out = hasten.attention(*leaves, Causal())
    assert len(packed) == 5, "q, k, v, out, lse"
    want = torch.autograd.grad(hasten.attention(*leaves, Causal()).sum(), leaves)
    for have, exact in zip(torch.autograd.grad(out.sum(), leaves), want, strict=True):
        assert torch.equal(have, exact)
    q = leaves[0] * 1.0
    out = hasten.attention(q, leaves[1], leaves[2])
    q += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_for_many_upstreams_at_once() -> None:
    """The operator has no rule for batches of gradients: refused, and never wrong."""
    leaves = [torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3)]
    out = hasten.attention(*leaves, Causal())
    upstreams = torch.randn(3, *out.shape)
    with pytest.raises(RuntimeError, match="hasten::attention_backward"):
        torch.autograd.grad(out, leaves, upstreams, is_grads_batched=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_frames_that_dynamo_gave_up_run_as_they_are() -> None:
    """After too many recompilations our own frames run below it: nothing of an implementation is traced."""
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 9, 2, 8, requires_grad=True) for _ in range(3))
    block = torch.compile(lambda mask: hasten.attention(q, k, v, mask) * 2, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for left in range(5):
            mask = Window(left, 0)
            have, want = block(mask), hasten.attention(q, k, v, mask) * 2
            torch.testing.assert_close(have, want)
            grads = torch.autograd.grad(have.sum(), (q, k, v))
            for grad, exact in zip(grads, torch.autograd.grad(want.sum(), (q, k, v)), strict=True):
                torch.testing.assert_close(grad, exact)


class Told:
    """An implementation that answers with noughts and remembers what the call said of determinism."""

    def __init__(self) -> None:
        self.told: list[tuple[str, bool]] = []

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        self.told.append(("forward", call.deterministic))
        return q.new_zeros((*q.shape[:-1], v.shape[-1])), q.new_zeros((q.shape[0], q.shape[2], q.shape[1]))

    def backward(self, dout: Tensor, dlse: Tensor | None, *saved: Any) -> Gradients:
        self.told.append(("backward", saved[-1].deterministic))
        return Gradients(*(torch.zeros_like(tensor) for tensor in saved[:3]))


@pytest.mark.parametrize("way", ["left out", "argument", "global", "compiled"])
def test_an_implementation_is_told_whether_to_be_deterministic(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    monkeypatch.setattr(choose, "load", lambda name: told)
    leaves = [torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3)]

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hasten.attention(q, k, v, deterministic=way in ("argument", "compiled"), implementation="blockwise")

    torch._dynamo.reset()
    function = torch.compile(block, backend="aot_eager", fullgraph=True) if way == "compiled" else block
    torch.use_deterministic_algorithms(way == "global")
    try:
        out = function(*leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    out.sum().backward()
    assert told.told == [("forward", way != "left out"), ("backward", way != "left out")]
