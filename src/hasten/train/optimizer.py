"""The optimizer: fused AdamW over float32 weights, gradients clipped without a wait for the device.

`Weights` stands between a model that computes in bfloat16 and the float32 weights that small updates need. Called by
the loop and by checkpoints; knows neither data nor loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hasten.train.config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class Weights:
    """The weights that are trained, by name: the model's own, or float32 masters of a model that becomes bfloat16."""

    def __init__(self, model: nn.Module, *, with_masters: bool) -> None:
        self.used: dict[str, Tensor] = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self.with_masters = with_masters
        self.trained = self.used
        if with_masters:
            self.trained = {name: one.detach().float().clone() for name, one in self.used.items()}
            for one in model.parameters():
                one.data = one.data.bfloat16()

    def collect(self) -> None:
        """Add the gradients of a micro-batch to those of the step; only masters need it, and sum in float32."""
        if not self.with_masters:
            return
        for name, weight in self.used.items():
            if weight.grad is not None:
                master = self.trained[name]
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Give the model the weights as they are now."""
        if self.with_masters:
            torch._foreach_copy_(list(self.used.values()), list(self.trained.values()))

    def gradients(self) -> list[Tensor]:
        """Gradients of the step, of those weights that have one."""
        return [weight.grad for weight in self.trained.values() if weight.grad is not None]


def make_optimizer(weights: Weights, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW, fused. Weights of two or more dimensions decay, others do not. Its state exists from the start."""
    matrices = [one for one in weights.trained.values() if one.ndim >= 2]
    vectors = [one for one in weights.trained.values() if one.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if params
    ]
    made = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    for weight in weights.trained.values():
        step = torch.zeros((), dtype=torch.float32, device=weight.device)
        made.state[weight] = {"step": step, **{name: torch.zeros_like(weight) for name in MOMENTS}}
    return made


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this learning rate in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip(weights: Weights, clip_norm: float) -> Tensor:
    """Scale the gradients so that their norm together is at most `clip_norm` (0: leave them as they are).

    Returns the norm they had, () float32, still on the device: nothing is read. Sharded gradients are summed over all
    processes.
    """
    gradients = weights.gradients()
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if clip_norm:
        scale = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            local.mul_(scale.to(local.dtype))
    return norm
