"""How the weights of a recorded step lie in memory, so that one row of activations meets them fast.

Called by `runner` for models that may be re-laid. Values, shapes and names of the parameters stay as they are.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn

_LINEAR = torch._C._nn.linear  # what torch.nn.functional.linear calls, and a recorder sees


def lay_out(graph: fx.Graph, root: nn.Module) -> None:
    """Join float32 CPU products of one row with several matrices into one, stored column by column, in place.

    Matrices that share their input (q, k and v; gate and up) become blocks of one (in, sum of outs) buffer,
    and the parameters views of it. One row meets columns at 14 to 29 GB/s on one core, rows at 8 to 14
    (docs/design/generation.md); matrices that are wider than tall in sum stay as they are. A matrix that
    something else reads too, as an embedding does, is copied instead. root: holds the graph's constants.
    """
    groups: dict[tuple[Any, bool], list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _LINEAR and _is_plain(root, node):
            groups[node.args[0], _bias(node) is None].append(node)
    for (_, is_without_bias), nodes in groups.items():
        weights = [_value(root, node.args[1]) for node in nodes]
        if sum(len(weight) for weight in weights) >= weights[0].shape[1]:
            _join(graph, root, nodes, weights, is_without_bias)


def _join(graph: fx.Graph, root: nn.Module, nodes: list[fx.Node], weights: list[Tensor], is_without_bias: bool) -> None:
    """Replace linear nodes of one input by one, and split its result."""
    columns = _as_laid_before(weights)
    if columns is None:
        columns = torch.cat([weight.detach() for weight in weights]).t().contiguous().t()
        for node, block in zip(nodes, columns.split([len(weight) for weight in weights]), strict=True):
            reader = node.args[1]
            assert isinstance(reader, fx.Node)
            if all(user.target is _LINEAR for user in reader.users):
                _value(root, reader).data = block
    name = f"columns_of_{nodes[0].name}"
    with graph.inserting_before(nodes[0]):
        root.register_buffer(name, columns, persistent=False)
        bias: fx.Node | None = None
        if not is_without_bias:
            joined = torch.cat([_value(root, _bias(node)).detach() for node in nodes])
            root.register_buffer(f"{name}_bias", joined, persistent=False)
            bias = graph.get_attr(f"{name}_bias")
        whole = graph.call_function(_LINEAR, (nodes[0].args[0], graph.get_attr(name), bias))
        start = 0
        for node, weight in zip(nodes, weights, strict=True):
            part = whole
            if len(nodes) > 1:
                part = graph.call_method("narrow", (whole, -1, start, len(weight)))
            start += len(weight)
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)


def _as_laid_before(weights: list[Tensor]) -> Tensor | None:
    """The buffer whose blocks, in order, the weights are, if an earlier step made it."""
    first, total = weights[0], sum(len(weight) for weight in weights)
    offset = first.storage_offset()
    for weight in weights:
        is_next = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not is_next or weight.stride() != (1, total) or weight.storage_offset() != offset:
            return None
        offset += len(weight)
    return torch.as_strided(first.detach(), (total, first.shape[1]), (1, total), first.storage_offset())


def _is_plain(root: nn.Module, node: fx.Node) -> bool:
    """True for the product of a computed row with a float32 CPU parameter."""
    row, reader = node.args[:2]
    if not isinstance(row, fx.Node) or not isinstance(reader, fx.Node) or reader.op != "get_attr":
        return False
    weight = _value(root, reader)
    return isinstance(weight, nn.Parameter) and weight.dtype == torch.float32 and weight.device.type == "cpu"


def _bias(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _value(root: nn.Module, reader: Any) -> Any:
    return getattr(root, reader.target)
