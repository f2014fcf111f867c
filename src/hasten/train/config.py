"""What a training run is asked for: frozen values, checked when they are made.

Made by the command line or read from the `settings.json` of a run folder. Knows no tensor and no file.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hasten.errors import ArgumentError

SCHEDULES = ("constant", "linear", "cosine", "rsqrt")
PRECISIONS = ("auto", "fp32", "bf16", "bf16-weights")
COMPILES = ("off", "default", "reduce-overhead", "max-autotune")
ATTENTIONS = ("hasten", "sdpa", "eager")
TOKEN_DTYPES = ("auto", "uint16", "uint32")

ConfigT = TypeVar("ConfigT")

#: What may differ when a run is resumed: where it writes, how often, how far, and how a step is computed.
FREE = frozenset(
    {
        *("out", "steps", "device", "compile", "attention", "micro_batch", "recompute", "tensorboard", "deterministic"),
        *("log_every", "save_every", "keep", "eval_every", "eval_data", "eval_rows"),
    }
)


def _check(argument: str, is_right: bool, expected: str, got: object, hint: str = "see hasten train --help") -> None:
    if not is_right:
        raise ArgumentError(argument, expected, repr(got), hint)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens, in rows of `seqlen`, in an order that `seed` decides.

    paths: text files, .jsonl, folders of these, or token files (.bin of uint16 or uint32, .npy); not both kinds.
    include: which files of a folder, as a shell pattern. text_field: the key of the text in JSON lines. separator:
    the token that ends a document in a token file; None takes the end-of-text token.
    """

    paths: tuple[str, ...]
    seqlen: int = 1024
    seed: int = 0
    include: str = "*"
    text_field: str = "text"
    token_dtype: str = "auto"
    separator: int | None = None

    def __post_init__(self) -> None:
        _check("data", len(self.paths) > 0, "at least one file or folder", self.paths, "give --data PATH")
        _check("seqlen", self.seqlen >= 2, "at least 2 tokens", self.seqlen)
        _check("seed", self.seed >= 0, "0 or more", self.seed)
        _check("token-dtype", self.token_dtype in TOKEN_DTYPES, f"one of {', '.join(TOKEN_DTYPES)}", self.token_dtype)
        _check("separator", self.separator is None or self.separator >= 0, "a token id", self.separator)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate of a step: a warm-up to `peak_lr`, then `kind` down to `min_ratio` of it at `total_steps`.

    start_step: how many steps of the schedule lie behind before this run: what uptraining continues.
    """

    total_steps: int
    kind: str = "cosine"
    peak_lr: float = 3e-4
    min_ratio: float = 0.1
    warmup_steps: int = 0
    start_step: int = 0

    def __post_init__(self) -> None:
        _check("schedule", self.kind in SCHEDULES, f"one of {', '.join(SCHEDULES)}", self.kind)
        _check("schedule-steps", self.total_steps >= 1, "at least 1", self.total_steps)
        _check("lr", 0 < self.peak_lr < 100, "above 0", self.peak_lr)
        _check("min-lr-ratio", 0 <= self.min_ratio <= 1, "0 to 1", self.min_ratio)
        is_within = 0 <= self.warmup_steps <= self.total_steps
        _check("warmup", is_within, f"0 to {self.total_steps} steps", self.warmup_steps)
        _check("start-step", self.start_step >= 0, "0 or more", self.start_step)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW: matrices decay, vectors do not; gradients are scaled down to `clip_norm` (0: never)."""

    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _check("weight-decay", 0 <= self.weight_decay < 1, "0 to 1", self.weight_decay)
        _check("beta1", 0 <= self.beta1 < 1, "0 to 1", self.beta1)
        _check("beta2", 0 <= self.beta2 < 1, "0 to 1", self.beta2)
        _check("eps", self.eps > 0, "above 0", self.eps)
        _check("clip", self.clip_norm >= 0, "0 (never) or more", self.clip_norm)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. `batch` rows a step, over all processes; `micro_batch` of them at a time in each (None: all).

    model: a checkpoint folder; or a folder or file with only a config.json, which starts from random weights.
    tokenizer: its folder, if not the model's. precision: "auto" is bf16 on a GPU and fp32 elsewhere; "bf16" is
    autocast over float32 weights; "bf16-weights" computes with bf16 weights and keeps a float32 master of each.
    recompute: activations of a layer are computed again in the backward. keep: how many checkpoints stand.
    deterministic: only operations that give the same bits every time, on a GPU too; a CPU does without asking.
    """

    model: str
    out: str
    data: DataConfig
    schedule: ScheduleConfig
    steps: int
    batch: int = 8
    micro_batch: int | None = None
    tokenizer: str | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: str = "auto"
    attention: str = "hasten"
    compile: str = "off"
    recompute: bool = False
    deterministic: bool = False
    seed: int = 0
    device: str = "auto"
    eval_data: tuple[str, ...] = ()
    eval_rows: int = 64
    eval_every: int = 0
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _check("steps", self.steps >= 1, "at least 1", self.steps)
        _check("batch", self.batch >= 1, "at least 1 row", self.batch)
        _check("micro-batch", self.micro_batch is None or self.micro_batch >= 1, "at least 1 row", self.micro_batch)
        _check("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}", self.precision)
        _check("compile", self.compile in COMPILES, f"one of {', '.join(COMPILES)}", self.compile)
        _check("attention", self.attention in ATTENTIONS, f"one of {', '.join(ATTENTIONS)}", self.attention)
        _check("seed", self.seed >= 0, "0 or more", self.seed)
        for name in ("eval_rows", "log_every", "save_every", "keep"):
            _check(name.replace("_", "-"), getattr(self, name) >= 1, "at least 1", getattr(self, name))
        _check("eval-every", self.eval_every >= 0, "0 (only at the ends) or more", self.eval_every)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values that JSON keeps; `from_dict` is the way back."""
    return {name: list(one) if isinstance(one, tuple) else one for name, one in _items(config)}


def from_dict(kind: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """The configuration that `to_dict` wrote; raises ArgumentError for a key it does not know or lacks."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ArgumentError("settings", f"keys of {kind.__name__}", repr(unknown[0]), f"known: {', '.join(hints)}")
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
            value = from_dict(typing.cast(type[Any], hints[name]), value)
        made[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**made)
    except TypeError as error:  # a key without default is missing
        raise ArgumentError("settings", f"all keys of {kind.__name__}", str(error), "add it") from error


def decisive(config: TrainConfig) -> dict[str, Any]:
    """What decides the weights of every step, by dotted names; a run is resumed only where these are equal."""
    flat: dict[str, Any] = {}
    for name, value in to_dict(config).items():
        if name in FREE:
            continue
        inner = value if isinstance(value, dict) else None
        flat.update({f"{name}.{key}": one for key, one in inner.items()} if inner is not None else {name: value})
    return flat


def _items(config: Any) -> list[tuple[str, Any]]:
    found = [(one.name, getattr(config, one.name)) for one in dataclasses.fields(config)]
    return [(name, to_dict(one) if dataclasses.is_dataclass(one) else one) for name, one in found]
