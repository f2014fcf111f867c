"""What a run tells while it goes: values, for a progress bar, a log or a test. Knows nothing of how they are shown."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_AHEAD = 4  # steps that the host may run before the device


@dataclass(frozen=True, kw_only=True)
class Started:
    """Everything is loaded; steps begin after `step` of `steps`, which is above 0 when resumed."""

    step: int
    steps: int
    num_parameters: int
    num_tokens: int
    rows_per_epoch: int
    processes: int
    device: str
    precision: str
    attention: str
    loss: str


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """A step done: mean loss over its labels in nats, learning rate, norm of the gradients before clipping.

    tokens_per_s and step_s are of all processes since the last such event. mfu: share of the datasheet's rate of the
    devices by causal FLOPs, mfu_palm by the convention that counts attention whole; None where no datasheet is known.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    step_s: float
    left_s: float
    mfu: float | None
    mfu_palm: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Mean loss in nats over the labels of rows that are not trained on."""

    step: int
    loss: float
    num_labels: int


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint stands at `path`; writing took `seconds`."""

    step: int
    path: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Something a user should know, in one line; the run goes on."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The run is over, or was asked to stop before its last step (`is_whole` is false then; it can be resumed).

    eval_first is the loss before this run's first step (of the whole run, not since it was resumed) and eval_last
    after its last, None without data to evaluate on. model: the folder that transformers loads.
    """

    step: int
    is_whole: bool
    loss: float | None
    eval_first: float | None
    eval_last: float | None
    seconds: float
    model: str | None


Event = Started | Stepped | Evaluated | Saved | Warned | Finished
Listener = Callable[[Event], None]


class Readings:
    """Numbers on their way from the device: asked for at once, read when they have come, so that nobody waits."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._pending: deque[tuple[int, Tensor, Any]] = deque()

    def put(self, step: int, values: Tensor) -> None:
        """Send off float32 values of a step; waits only if the device is several steps behind."""
        if not self._is_gpu:
            self._pending.append((step, values.detach().clone(), None))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((step, host, event))
        if len(self._pending) > _AHEAD:
            self._pending[-_AHEAD - 1][2].synchronize()

    def take(self, *, wait: bool = False) -> list[tuple[int, list[float]]]:
        """(step, values) of all that have come, in order; of all that were sent, if asked to wait."""
        found = []
        while self._pending and (wait or not self._is_gpu or self._pending[0][2].query()):
            step, host, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            found.append((step, host.tolist()))
        return found


def is_sound(values: list[float]) -> bool:
    """True if all are numbers."""
    return all(map(math.isfinite, values))
