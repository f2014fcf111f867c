"""One training step of one process, and an evaluation: from batches to new weights, with nothing read from the device.

Made by the loop, which decides what is stepped and when. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hasten.train import distributed, optimizer
from hasten.train.config import TrainConfig
from hasten.train.data import Batch, Plan, Rows
from hasten.train.distributed import World
from hasten.train.loss import IGNORED
from hasten.train.model import LanguageModel, decoder_layers, enable_recompute
from hasten.train.optimizer import Weights


def resolve_precision(config: TrainConfig, device: torch.device) -> str:
    """What "auto" is on a device."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a model of that precision computes."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


class Step:
    """A model on its device with its optimizer: `train` makes one step, `evaluate` a mean loss."""

    def __init__(self, model: Any, config: TrainConfig, world: World) -> None:
        self.config, self.world, self.device = config, world, world.device
        self.precision = resolve_precision(config, world.device)
        self.language = LanguageModel(model)
        layers = decoder_layers(model)
        if config.recompute:
            enable_recompute(model)
        self.language.to(world.device)
        has_masters = self.precision == "bf16-weights" and world.size == 1
        weights = Weights(model, with_masters=True) if has_masters else None
        if config.compile != "off":
            self._compile(layers if world.size > 1 else [self.language])
        if world.size > 1:
            distributed.shard(self.language, layers, world, in_bf16=self.precision == "bf16-weights")
        self.weights = weights or Weights(model, with_masters=False)
        self.optimizer = optimizer.make_optimizer(self.weights, config.optimizer)
        self.marks_steps = config.compile in ("reduce-overhead", "max-autotune")

    def train(self, batches: list[Batch], lr: float) -> Tensor:
        """One step over the micro-batches of this process, at a learning rate.

        Returns float32 (2,): the mean loss over the labels of all processes, and the norm of the gradients.
        """
        count = torch.full((), float(sum(one.num_labels for one in batches)), device=self.device)
        count = self.world.sum(count).clamp(min=1.0)
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            distributed.sync_gradients(self.language, number == len(batches) - 1)
            loss = self._loss(batch)
            (loss * (self.world.size / count)).backward()  # FSDP averages
            self.weights.collect()
            total += loss.detach()
        norm = optimizer.clip(self.weights, self.config.optimizer.clip_norm)
        optimizer.set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.weights.publish()
        return torch.stack([self.world.sum(total) / count, norm])

    def evaluate(self, rows: Rows, plan: Plan, most: int) -> tuple[float, int]:
        """(mean loss, labels) over up to `most` rows; see `evaluate`."""
        self.language.eval()
        found = evaluate(self._loss, rows, plan, most, self.world)
        self.language.train()
        return found

    def _loss(self, batch: Batch) -> Tensor:
        if self.marks_steps:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(self.precision, self.device):
            loss: Tensor = self.language(batch.ids, batch.positions, batch.labels)
        return loss

    def _compile(self, modules: list[Any]) -> None:
        mode = None if self.config.compile == "default" else self.config.compile
        for module in modules:
            compile_module: Callable[..., None] = module.compile
            compile_module(mode=mode, dynamic=False)


@torch.no_grad()
def evaluate(loss_of: Callable[[Batch], Tensor], rows: Rows, plan: Plan, most: int, world: World) -> tuple[float, int]:
    """(mean loss, labels) over up to `most` rows, the same ones every time; 0 labels give a loss of 0.

    loss_of: the summed loss of a batch. All processes take equally many batches; those that have no rows left take one
    that counts nothing.
    """
    wanted = min(most, rows.rows_per_epoch)
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    for begin in range(0, wanted, plan.micro_batch * plan.world):
        first = begin + plan.rank * plan.micro_batch
        batch = rows.batch([index if index < wanted else 0 for index in range(first, first + plan.micro_batch)])
        batch.labels[max(0, min(plan.micro_batch, wanted - first)) :] = IGNORED
        count = int((batch.labels != IGNORED).sum())
        sums += torch.stack([loss_of(batch.to(world.device)).double(), torch.full_like(sums[0], count)])
    loss, count = world.sum(sums).tolist()
    return (loss / count if count else 0.0), int(count)
