"""A computation on static tensors, captured once and replayed: a CUDA graph behind a function.

Called by decode_steps.py, which tests give a capture that needs no GPU. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hasten.errors import ArgumentError

Run = Callable[[], None]
#: takes what is to be captured, which has run before; returns what replays it. Raises what the capture raises.
Capture = Callable[[Run], Run]


class CudaCapture:
    """Captures graphs on one device, whose intermediate results share memory: they are not replayed side by side."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """What replays `run` on the current stream, reading and writing the same memory."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            try:
                # other threads go on: they make generators and small tensors for new requests
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    run()
            finally:
                torch.cuda.set_stream(before)  # which a capture that fails leaves changed
        return graph.replay


def capture_for(device: torch.device, is_wanted: bool | None) -> Capture | None:
    """How decode steps are captured on a device, None if they are not; is_wanted None is True on CUDA."""
    is_cuda = device.type == "cuda"
    if is_wanted and not is_cuda:
        raise ArgumentError("cuda_graphs", "False, or a model on CUDA", f"True on {device.type}", "leave it out")
    return CudaCapture(device) if is_cuda and is_wanted is not False else None


def reason_of(error: BaseException) -> str:
    """In a line, why a capture failed: the first of the errors that it raised one after another."""
    while error.__context__ is not None:
        error = error.__context__
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {text[:200]}"


__all__ = ["Capture", "CudaCapture", "Run", "capture_for", "reason_of"]
