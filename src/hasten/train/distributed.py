"""One process or many: who we are, what we agree on, and a model whose weights are spread by FSDP2.

Many are started by `torchrun`; torch.distributed does the rest. Called by the loop and by checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hasten.errors import ArgumentError

_PATIENCE = timedelta(hours=4)  # the others wait while the first process makes tokens of the text


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, computing on `device`."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """True for the one process that writes what is written once, and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def first_error(self, error: BaseException | None) -> str | None:
        """What went wrong in any process, the same text in all of them; None if nothing did."""
        text = None if error is None else f"{type(error).__name__}: {error}".strip()
        if self.size == 1:
            return text
        found: list[str | None] = [None] * self.size
        dist.all_gather_object(found, text)
        return next((one for one in found if one is not None), None)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, in place; on a GPU nothing waits for it."""
        if self.size > 1:
            dist.all_reduce(value)
        return value


@contextmanager
def join(device: str) -> Iterator[World]:
    """The world of this process: all that torchrun started, or a group that is already there, or it alone.

    device: "auto" is the GPU of this process where there is one. Raises ArgumentError for a device that is not here.
    """
    launched = dist.is_available() and dist.is_torchelastic_launched()
    begins = launched and not dist.is_initialized()
    if begins:
        is_gpu = device != "cpu" and torch.cuda.is_available()
        dist.init_process_group("nccl" if is_gpu else "gloo", timeout=_PATIENCE)
    try:
        if launched or (dist.is_available() and dist.is_initialized()):
            rank = dist.get_rank()
            local = dist.get_node_local_rank(fallback_rank=rank)
            yield World(_device(device, local), rank, dist.get_world_size())
        else:
            yield World(_device(device, 0))
        if begins:
            dist.barrier()  # leave together: a process that ends while another still talks to it can take it down
    finally:
        if begins:
            dist.destroy_process_group()


def shard(language: nn.Module, layers: list[nn.Module], world: World, *, in_bf16: bool) -> None:
    """Spread the weights over all processes, layer by layer and then the rest, in place; they stay float32.

    in_bf16: gathered, multiplied and freed in bfloat16; gradients are summed in float32 all the same.
    """
    from torch.distributed.device_mesh import init_device_mesh  # loads distributed tensors, only for many processes
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    dtype = torch.bfloat16 if in_bf16 else None
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(dtype, torch.float32)}
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(language, **options)


def sync_gradients(language: nn.Module, is_last: bool) -> None:
    """Sum gradients over processes in the coming backward, or leave that to the last micro-batch of the step."""
    if hasattr(language, "set_requires_gradient_sync"):
        fsdp: Any = language
        fsdp.set_requires_gradient_sync(is_last)


def full_weights(model: Any) -> dict[str, Tensor]:
    """Every weight as a whole, on the CPU, by name; empty in all processes but the first. All must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # as above

    found: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return found


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(name)
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", local_rank)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # an unknown name; a build of torch without that device
        raise ArgumentError("device", "a device of this machine", repr(name), f"try cpu ({error})") from error
    if place.type == "cuda":
        torch.cuda.set_device(place)
    return place
