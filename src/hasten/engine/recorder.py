"""A forward of a model, run once and written down as a flat graph of tensor operations.

Used by `step` for the decode step, where Python's walk through nested modules takes longer than the arithmetic.
What a graph cannot repeat faithfully is refused with `NotRecordable`. Knows no model, cache or attention.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# reads of a tensor's values that pass the dispatcher by
_READS = {"tolist", "numpy", "__array__"}
_IN_PLACE_OPERATORS = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__ipow__"}
_DATA_DEPENDENT = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
_FUNCTIONS: dict[Any, Callable[..., Any]] = {Tensor.__getitem__: operator.getitem, Tensor.__setitem__: operator.setitem}
_METHODS: dict[Any, str] = {
    method: name
    for kind in (torch._C.TensorBase, Tensor)
    for name, method in vars(kind).items()
    if callable(method) and method not in _FUNCTIONS
}
_MAX_FOLDED_BYTES = 256 * 2**20


class NotRecordable(Exception):
    """The forward does something that a flat graph would not repeat; the message says what."""


class Recorder(TorchFunctionMode):
    """Records every torch function that depends on an input, while it is entered as a context.

    What does not depend on an input is computed once and becomes a constant. Shapes and Python numbers are
    those of the recorded run, so every function whose shape or result depends on values is refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.root = nn.Module()  # holds the constants of the graph
        self._nodes: dict[int, fx.Node] = {}
        self._made: set[int] = set()  # tensors that the recorded forward computed from constants
        self._outside: set[int] = set()  # memory of inputs, of tensors made before, and of constants in the graph
        self._alive: list[Tensor] = []  # so that no id is used twice
        self._impure: set[fx.Node] = set()
        self._folded_bytes = 0
        self._num_constants = 0
        self._is_paused = False
        self._contexts = ExitStack()
        self.caller: str | None = None  # the torch function that runs and depends on an input

    def __enter__(self) -> Recorder:
        # in inference mode, composite operations would come to the watch in one piece and hide what they read
        self._contexts.enter_context(torch.inference_mode(False))
        self._contexts.enter_context(torch.no_grad())
        super().__enter__()  # type: ignore[no-untyped-call]
        self._contexts.enter_context(_Watch(self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._contexts.__exit__(*exception)
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def input(self, name: str, value: Tensor | None = None) -> fx.Node:
        """An argument of the graph to be; `value` is the tensor that stands for it in the recorded run."""
        node = self.graph.placeholder(name)
        if value is not None:
            self._bind(value, node)
            self._outside.add(_memory(value))
        return node

    def call(self, function: Callable[..., Tensor], *arguments: Any, live: dict[int, Any]) -> Tensor:
        """Run `function` with nothing inside it recorded, and record the call itself.

        Nodes among the arguments are given to the graph as they are; `live` says by their place what they
        are in this run. The call is kept even if nobody uses its result.
        """
        self._is_paused = True
        try:
            with torch.inference_mode():
                result = function(*(live.get(place, value) for place, value in enumerate(arguments)))
        finally:
            self._is_paused = False
        node = self.graph.call_function(function, self._refer(arguments))
        self._impure.add(node)
        self._bind(result, node)
        return result

    def finish(self, output: Tensor) -> None:
        """Make the graph return `output`, and drop from it what that does not need."""
        if id(output) not in self._nodes:
            raise NotRecordable("its result does not depend on its inputs")
        self.graph.output(self._nodes[id(output)])
        self.graph.eliminate_dead_code(lambda node: node in self._impure or node.op in ("placeholder", "output"))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one torch function and write it down if it depends on an input."""
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        given = list(_tensors((args, kwargs)))
        self._outside |= {_memory(tensor) for tensor in given if id(tensor) not in self._made | self._nodes.keys()}
        depends = self.depends(given)
        if _is_in_place(name, kwargs):
            self._check_target(name, kwargs.get("out", args[0] if args else None), depends)
        if not depends:
            result = func(*args, **kwargs)
            for tensor in _tensors(result):
                self._made.add(id(tensor))
                self._alive.append(tensor)
            return result
        if name in _READS:
            raise NotRecordable(f"{name} reads values")
        self.caller = name
        try:
            result = func(*args, **kwargs)
        finally:
            self.caller = None
        self._write_down(func, name, args, kwargs, result)
        return result

    def depends(self, tensors: Iterable[Any]) -> bool:
        """True if one of them is an input, or computed from one."""
        return any(id(tensor) in self._nodes and self._nodes[id(tensor)].op != "get_attr" for tensor in tensors)

    def _check_target(self, name: str, target: Any, depends: bool) -> None:
        """Refuse to write into what is there before the step, or would be there after it."""
        if not isinstance(target, Tensor) or _memory(target) in self._outside:
            raise NotRecordable(f"{name} writes into a tensor that outlives the step")
        if depends and not self.depends([target]):
            raise NotRecordable(f"{name} writes into a tensor that is the same at every step")

    def _write_down(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        is_in_place = _is_in_place(name, kwargs)
        if isinstance(result, Tensor) and id(result) in self._nodes and not is_in_place:
            return  # x.to(dtype it has) is x
        if not is_in_place and not any(True for _ in _tensors(result)):
            return  # a shape, a dtype, a device
        node = self._emit(func, name, args, kwargs)
        if is_in_place:
            self._impure.add(node)
        if isinstance(result, Tensor):
            self._bind(result, node)
        elif isinstance(result, tuple | list):
            for index, part in enumerate(result):
                if not isinstance(part, Tensor):
                    raise NotRecordable(f"{name} returns nested values")
                self._bind(part, self.graph.call_function(operator.getitem, (node, index)))

    def _emit(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        if name == "__get__":  # a property: .T, .mT, .data
            return self.graph.call_function(getattr, (self._refer(args[0]), func.__self__.__name__))  # type: ignore[attr-defined]
        try:
            if func in _METHODS:  # Python's operators come as functions whose names fx could not find again
                return self.graph.call_method(_METHODS[func], self._refer(args), self._refer(kwargs))
            return self.graph.call_function(_FUNCTIONS.get(func, func), self._refer(args), self._refer(kwargs))
        except NotImplementedError as error:  # fx: an argument it cannot write
            raise NotRecordable(f"{name} takes an argument that has no literal: {error}") from error

    def _refer(self, value: Any) -> Any:
        """The value with its tensors replaced by their nodes."""
        if isinstance(value, Tensor):
            return self._nodes[id(value)] if id(value) in self._nodes else self._constant(value)
        if isinstance(value, tuple | list):
            return tuple(self._refer(part) for part in value)
        if isinstance(value, dict):
            return {name: self._refer(part) for name, part in value.items()}
        if isinstance(value, slice):
            return slice(self._refer(value.start), self._refer(value.stop), self._refer(value.step))
        return value

    def _constant(self, tensor: Tensor) -> fx.Node:
        if id(tensor) in self._made:
            self._folded_bytes += tensor.untyped_storage().nbytes()
        if self._folded_bytes > _MAX_FOLDED_BYTES:
            raise NotRecordable("what it computes from its weights alone is too large to keep")
        name = f"constant_{self._num_constants}"
        self._num_constants += 1
        if isinstance(tensor, nn.Parameter):
            self.root.register_parameter(name, tensor)
        else:
            self.root.register_buffer(name, tensor)
        node = self.graph.get_attr(name)
        self._bind(tensor, node)
        self._outside.add(_memory(tensor))
        return node

    def _bind(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)


class _Watch(TorchDispatchMode):
    """Refuses operations whose shape or result depends on values of the inputs, below all torch functions."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, or refuse it."""
        if any(tag in func.tags for tag in _DATA_DEPENDENT):
            is_gather = func.overloadpacket is torch.ops.aten.index and not _has_bool_index(args[1])
            # `if tensor:` comes here without a torch function
            if not is_gather and (self._recorder.caller is not None or self._recorder.depends(args)):
                raise NotRecordable(f"{self._recorder.caller or 'a condition'} depends on values, not on shapes alone")
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _has_bool_index(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _is_in_place(name: str, kwargs: dict[str, Any]) -> bool:
    if name.endswith("_") and not name.endswith("__"):
        return True
    return name in _IN_PLACE_OPERATORS or kwargs.get("out") is not None or bool(kwargs.get("inplace"))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, slice):
        yield from _tensors((value.start, value.stop, value.step))
