"""Uptraining (Ainslie 2023): a converted checkpoint trained on a little, from where the original's schedule stopped.

`plan` turns an original run's length into a configuration, `uptrain` runs it and says what it brought. The conversion
itself is `hasten.convert`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from hasten.convert import gqa_folder, heads, source
from hasten.errors import ArgumentError, CheckpointError
from hasten.models import builtin
from hasten.train import distributed
from hasten.train import model as model_module
from hasten.train.config import TrainConfig
from hasten.train.data import Batch, Plan, Rows
from hasten.train.events import Listener
from hasten.train.loop import train
from hasten.train.model import BUILTIN, LanguageModel
from hasten.train.run_folder import eval_name
from hasten.train.step import autocast, evaluate, resolve_precision
from hasten.train.tokens import open_tokens

CONVERTED = "converted"


@dataclass(frozen=True, kw_only=True)
class Uptrained:
    """What uptraining brought: mean losses in nats over the same rows, and bytes of KV cache a token in 16 bits.

    original_loss is that of the model before it was converted, None where it is not known; before is after no step at
    all, after is the end. gap_closed: the share of (before - original) that was won back, None without an original.
    """

    steps: int
    fraction: float
    original_loss: float | None
    before: float | None
    after: float | None
    gap_closed: float | None
    original_kv_bytes: int | None
    kv_bytes: int | None
    seconds: float
    model: str | None


def plan(config: TrainConfig, original_steps: int, fraction: float) -> TrainConfig:
    """The configuration with `fraction` of the original's steps, its schedule continued where the original stopped.

    Raises ArgumentError for a share that is not above 0 and at most 1, and for an original without steps.
    """
    if original_steps < 1:
        raise ArgumentError("original-steps", "at least 1", original_steps, "how long was the original trained?")
    if not 0 < fraction <= 1:
        raise ArgumentError("fraction", "above 0, at most 1", fraction, "the paper takes 0.05")
    steps = max(1, math.ceil(round(fraction * original_steps, 6)))
    return replace(config, steps=steps, schedule=replace(config.schedule, start_step=original_steps))


def convert(config: TrainConfig, kv_heads: int, method: str, progress: Callable[[str], None]) -> TrainConfig:
    """Convert the configuration's model to fewer key/value heads, once, below its run folder; returns it with that."""
    if dist.is_available() and dist.is_torchelastic_launched():
        hint = "run hasten convert gqa first, and give its folder"
        raise ArgumentError("kv-heads", "one process to convert", "many", hint)
    path = str(builtin.path()) if config.model == BUILTIN else config.model
    target = Path(config.out).expanduser() / CONVERTED
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        gqa_folder.convert_folder(path, target, kv_heads, method=method, seed=config.seed, progress=progress)
    return replace(config, model=str(target))


def uptrain(config: TrainConfig, listen: Listener, *, original: str | None = None) -> Uptrained:
    """Train a planned configuration and hold it against `original`, the model before its conversion, if one is given.

    Raises as `train` does.
    """
    end = train(config, listen)
    loss = _loss_of(original, config) if original is not None and config.eval_data else None
    gap = None if loss is None or end.eval_first is None else end.eval_first - loss
    won = None if gap is None or end.eval_last is None or end.eval_first is None else end.eval_first - end.eval_last
    return Uptrained(
        steps=end.step,
        fraction=end.step / config.schedule.start_step,
        original_loss=loss,
        before=end.eval_first,
        after=end.eval_last,
        gap_closed=None if won is None or not gap or gap < 0 else won / gap,
        original_kv_bytes=None if original is None else kv_bytes(original),
        kv_bytes=kv_bytes(config.model),
        seconds=end.seconds,
        model=end.model,
    )


def kv_bytes(model: str) -> int | None:
    """Bytes that a token takes in the KV cache of a checkpoint, in 16 bits; None for an unknown architecture."""
    path = builtin.path() if model == BUILTIN else Path(model).expanduser()
    try:
        found = heads.sites(source.load_shapes(path))
    except (ArgumentError, CheckpointError):
        return None
    return sum(2 * 2 * site.num_kv_heads * site.head_dim for site in found if not site.is_cross)


def _loss_of(model: str, config: TrainConfig) -> float:
    """The loss of another model on the evaluation rows of a run that was made."""
    with distributed.join(config.device) as world:
        loaded = model_module.load(model, tokenizer=config.tokenizer, attention=config.attention)
        language = LanguageModel(loaded.model).to(world.device).eval()
        tokens = open_tokens(Path(config.out).expanduser() / "data", eval_name(config))
        micro = config.micro_batch or config.batch
        precision = resolve_precision(config, world.device)

        def loss_of(batch: Batch) -> Tensor:
            with autocast(precision, world.device):
                loss: Tensor = language(batch.ids, batch.positions, batch.labels)
            return loss

        rows, rows_at_once = Rows(tokens, config.data.seqlen, 0), Plan(batch=micro, micro_batch=micro)
        return evaluate(loss_of, rows, rows_at_once, config.eval_rows, world)[0]
