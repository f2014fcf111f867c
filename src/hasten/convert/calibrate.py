"""What the attention layers of a model read on real text: second moments of their inputs. Called by `gqa`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hasten.convert.heads import Site
from hasten.errors import ArgumentError


@torch.no_grad()
def second_moments(model: Any, sites: list[Site], calibration: Iterable[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """For every layer E[x x^T] of what q reads and of what k and v read, with a constant 1 as the last entry of x.

    calibration: token ids, int64 (batch, seqlen) each, without padding; an encoder and a decoder both read them.
    Returns float32 (width + 1, width + 1) pairs by path. Raises ArgumentError if there is no token.
    """
    sums: dict[str, Tensor] = {}
    hooks = []
    for site in sites:
        attention = model.get_submodule(site.path)
        q, kv = site.layout.projections[0], site.layout.projections[min(1, len(site.layout.projections) - 1)]
        for name in {q, kv} if site.is_cross else {kv}:
            hook = _summing(sums, f"{site.path}.{name}")
            hooks.append(attention.get_submodule(name).register_forward_pre_hook(hook))
    was_training = model.training
    try:
        for batch in calibration:
            ids = batch.to(model.device)
            others = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            model.eval()(input_ids=ids, use_cache=False, **others)
    finally:
        model.train(was_training)
        for hook_handle in hooks:
            hook_handle.remove()
    if not sums:
        raise ArgumentError("calibration", "at least one batch of token ids", "none", "pass (batch, seqlen) tensors")
    found = {}
    for site in sites:
        q, kv = site.layout.projections[0], site.layout.projections[min(1, len(site.layout.projections) - 1)]
        seen = sums[f"{site.path}.{kv}"]
        found[site.path] = (sums[f"{site.path}.{q}"] if site.is_cross else seen, seen)
    return {path: (q / q[-1, -1], kv / kv[-1, -1]) for path, (q, kv) in found.items()}


def _summing(sums: dict[str, Tensor], name: str) -> Callable[[Any, tuple[Any, ...]], None]:
    """A hook that adds the outer products of its module's input to `sums[name]`."""

    def add(module: Any, given: tuple[Any, ...]) -> None:
        rows = given[0].detach().flatten(0, -2).float()
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        sums[name] = sums.get(name, 0) + rows.T @ rows

    return add
