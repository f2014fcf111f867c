"""Tiny runs for tests: a small Llama on a page of text, and whether two runs ended in the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hasten.train import DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from tests.engine.tiny_checkpoints import llama

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. "


def prepare(folder: Path, **options: Any) -> Path:
    """A model and some text below a folder; returns the folder."""
    llama(folder / "model", attention_dropout=0.1, **options)
    data = folder / "data"
    data.mkdir()
    for number in range(12):
        (data / f"{number:02d}.txt").write_text(TEXT[number:] * (1 + number % 4))
    (folder / "held-out.txt").write_text(TEXT * 3)
    return folder


def config(folder: Path, out: str = "run", **changes: Any) -> TrainConfig:
    """A run of 8 steps that saves every 2; dropout makes its weights depend on the random state."""
    made = TrainConfig(
        model=str(folder / "model"),
        out=str(folder / out),
        data=DataConfig(paths=(str(folder / "data"),), seqlen=16),
        schedule=ScheduleConfig(total_steps=8, warmup_steps=2, peak_lr=1e-2),
        optimizer=OptimizerConfig(weight_decay=0.1),
        steps=8,
        batch=4,
        save_every=2,
        log_every=1,
        keep=3,
        device="cpu",
    )
    return replace(made, **changes)


def tensors(out: Path, step: int = 8) -> dict[str, torch.Tensor]:
    """Weights and optimizer of a checkpoint."""
    folder = out / "checkpoints" / f"step-{step:09d}"
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """True if both hold the same names and bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
