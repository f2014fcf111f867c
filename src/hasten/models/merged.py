"""Linear layers that read the same input, as q, k and v or gate and up do, computed by one product.

Their weights become parts of one matrix; names, shapes and values of the parameters stay. Called by the engine, whose
decode steps wait for weights: one large product reads them faster than several small ones. Knows no architecture:
which layers share an input is seen in a forward.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "parametrizations")
#: how far logits may be from those before, in units of the dtype's rounding and of the largest of them
_ROUNDING = 64


class Group:
    """One matrix of several layers: weight (sum of outs, in), bias (sum of outs,) or None; sizes: the outs."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.pending: tuple[Tensor, Sequence[Tensor]] | None = None  # an input, and what each layer makes of it
        for place, layer in enumerate(layers):
            layer.weight.data = self.weight.split(self.sizes)[place]
            if self.bias is not None:
                layer.bias.data = self.bias.split(self.sizes)[place]
            layer.__class__ = MergedLinear
            assert isinstance(layer, MergedLinear)
            layer.group, layer.place, layer.address = self, place, layer.weight.data_ptr()

    def compute(self, x: Tensor) -> Tensor:
        """What the first layer makes of x; what the others do is kept for them."""
        parts = functional.linear(x, self.weight, self.bias).split(self.sizes, -1)
        self.pending = (x, parts)
        return parts[0]

    def take(self, x: Tensor, place: int) -> Tensor | None:
        """What was computed for a later layer, if it was from this very tensor."""
        pending = self.pending
        if pending is None or pending[0] is not x:
            return None
        if place == len(self.sizes) - 1:
            self.pending = None
        return pending[1][place]


class MergedLinear(nn.Linear):
    """An `nn.Linear` whose weight is part of a group's. With gradients, or its weight elsewhere, as any other."""

    group: Group
    place: int
    address: int

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        is_there = torch.compiler.is_compiling() or self.weight.data_ptr() == self.address
        if is_there and not torch.is_grad_enabled():
            out = self.group.compute(x) if self.place == 0 else self.group.take(x, self.place)
            if out is not None:
                return out
        return functional.linear(x, self.weight, self.bias)


class Merged:
    """What has been merged in a model: `names` of the layers, by group. `undo` makes them plain again, in place."""

    def __init__(self, layers: Sequence[tuple[str, nn.Linear]], groups: Sequence[Sequence[int]]) -> None:
        self.names = [tuple(layers[index][0] for index in group) for group in groups]
        self._layers: list[Any] = [layers[index][1] for group in groups for index in group]
        for group in groups:
            Group([layers[index][1] for index in group])

    def undo(self) -> None:
        """Each layer computes its own product again. Weights stay where they are."""
        still: list[Any] = [one for one in self._layers if type(one) is MergedLinear]
        for layer in still:
            del layer.group, layer.place, layer.address
            layer.__class__ = nn.Linear


@torch.inference_mode(False)
@torch.no_grad()
def merge(model: Any) -> Merged:
    """Merge the linear layers of a transformers model that read the same input, in place.

    Layers of one module that a forward gives the same tensor, and that are plain: nn.Linear itself, with no hooks and
    nothing instead of its forward, weights of the same dtype and device that nothing else has, all with a bias or none.
    A model whose logits then differ by more than rounding, or that does not run, is left as it was.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear]
    ids = torch.arange(3, device=model.device)[None]  # of several tokens, whose strides count
    seen, before = _watch(model, ids, layers)
    groups = [group for group in seen if _are_plain(model, [layers[index][1] for index in group])]
    merged = Merged(layers, groups)
    try:
        after = _logits(model, ids)
        is_same = bool((after - before).abs().max() <= _ROUNDING * torch.finfo(model.dtype).eps * before.abs().max())
    except (RuntimeError, TypeError, ValueError):
        is_same = False
    if not is_same and groups:
        merged.undo()
        merged.names = []
    if ids.is_cuda:
        torch.cuda.empty_cache()  # where the weights lay before is free, for a cache that counts what is
    return merged


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _watch(model: Any, ids: Tensor, layers: Sequence[tuple[str, nn.Linear]]) -> tuple[list[list[int]], Tensor]:
    """(groups of layers of one module that a forward calls once each, with the same tensor; the logits)."""
    calls: list[tuple[int, Tensor]] = []

    def note(index: int) -> Any:
        return lambda module, arguments: calls.append((index, arguments[0]))

    hooks = [layer.register_forward_pre_hook(note(index)) for index, (_, layer) in enumerate(layers)]
    try:
        logits = _logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    counts = Counter(index for index, _ in calls)
    groups: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for index, x in calls:  # which all live, so that no two have the same id
        if counts[index] == 1:
            groups[layers[index][0].rpartition(".")[0], id(x)].append(index)
    return [group for group in groups.values() if len(group) > 1], logits


def _are_plain(model: nn.Module, layers: Sequence[nn.Linear]) -> bool:
    users = Counter(one.data_ptr() for _, one in model.named_parameters(remove_duplicate=False))
    first = layers[0]
    for layer in layers:
        weights = [one for one in (layer.weight, layer.bias) if one is not None]
        is_own = all(type(one.data) is Tensor and users[one.data_ptr()] == 1 for one in weights)
        is_bare = "forward" not in vars(layer) and not any(getattr(layer, name, None) for name in _HOOKS)
        is_alike = (layer.bias is None) == (first.bias is None) and all(
            (one.dtype, one.device) == (first.weight.dtype, first.weight.device) for one in weights
        )
        if not (is_own and is_bare and is_alike and layer.weight.device.type != "meta"):
            return False
    return True


__all__ = ["Merged", "MergedLinear", "merge"]
