"""A model's forward under torch.compile, a graph for each size of decode steps; or as it is, with the reason.

Called by the runner, for what decode_steps.py captures. Knows no model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from hasten.engine.attend_pages import Pages
from hasten.engine.graphs import reason_of

_MOST_SIZES = 1024  # of which each is compiled on its own, where PyTorch's own limit is 8


class CompiledForward:
    """A forward (decode_steps.py) of fixed shapes, compiled whole when a shape is first met.

    `refusal`: why it is not compiled any more, None while it is. backend: of torch.compile.
    """

    def __init__(self, forward: Callable[[Tensor, Tensor, Pages], Tensor], backend: str = "inductor") -> None:
        self._forward = forward
        self._compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend=backend)
        self.refusal: str | None = None

    def __call__(self, ids: Tensor, positions: Tensor, pages: Pages) -> Tensor:
        """Logits (1, total, vocab); raises what the model raises."""
        if self.refusal is None:
            try:
                with torch._dynamo.config.patch(
                    recompile_limit=_MOST_SIZES, accumulated_recompile_limit=4 * _MOST_SIZES
                ):
                    return self._compiled(ids, positions, pages)
            except torch._dynamo.exc.TorchDynamoException as error:
                self.refusal = reason_of(error)
                logging.getLogger("hasten").warning("engine: decode steps are not compiled, since %s", self.refusal)
        return self._forward(ids, positions, pages)


__all__ = ["CompiledForward"]
