"""`hasten train`: a model on local text, from random weights or further; the same command resumes it.

What happens goes to stderr, what came of it to stdout. All work is in `hasten.train`. Many GPUs:
`torchrun --nproc-per-node 8 --no-python hasten train ...`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.train_progress import Display, summary

if TYPE_CHECKING:
    from hasten.train import TrainConfig

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local checkpoint; a config.json (random weights); or builtin.")
]
Data = Annotated[list[str], typer.Option(help="Text, JSON lines, a folder, or token files; may be given again.")]
Out = Annotated[str, typer.Option(help="The run folder; one with the same settings is resumed.")]
Tokenizer = Annotated[str | None, typer.Option(help="Its folder, or builtin, if not the model's own.")]
Seqlen = Annotated[int, typer.Option(help="Tokens of a row.")]
Batch = Annotated[int, typer.Option(help="Rows of a step, over all processes.")]
MicroBatch = Annotated[int | None, typer.Option(help="Rows at a time in a process; all of them if not given.")]
Lr = Annotated[float, typer.Option(help="The peak of the learning rate.")]
Warmup = Annotated[int, typer.Option(help="Steps to reach it.")]
Schedule = Annotated[str, typer.Option(help="constant, linear, cosine or rsqrt.")]
MinLrRatio = Annotated[float, typer.Option(help="What is left of the rate at the end of the schedule.")]
WeightDecay = Annotated[float, typer.Option(help="Of matrices; vectors do not decay.")]
Beta2 = Annotated[float, typer.Option(help="Of AdamW.")]
Clip = Annotated[float, typer.Option(help="Largest norm of the gradients; 0 does not clip.")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 (autocast), bf16-weights (float32 masters).")]
Compile = Annotated[str, typer.Option(help="off, default, reduce-overhead (CUDA graphs), max-autotune.")]
Attention = Annotated[str, typer.Option(help="hasten, sdpa or eager.")]
Recompute = Annotated[bool, typer.Option("--recompute", help="Less memory: compute activations twice.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="The same bits every time, on a GPU too.")]
Seed = Annotated[int, typer.Option(help="Of weights, of dropout and of the order of the data.")]
EvalData = Annotated[list[str] | None, typer.Option(help="Held-out data; may be given again.")]
EvalEvery = Annotated[int, typer.Option(help="Steps; 0 evaluates at both ends only.")]
EvalRows = Annotated[int, typer.Option(help="At most so many rows.")]
LogEvery = Annotated[int, typer.Option(help="Steps.")]
SaveEvery = Annotated[int, typer.Option(help="Steps.")]
Keep = Annotated[int, typer.Option(help="How many checkpoints stand.")]
Include = Annotated[str, typer.Option(help="Which files of a folder, such as '*.py'.")]
TextField = Annotated[str, typer.Option(help="The key of the text in JSON lines.")]
TokenDtype = Annotated[str, typer.Option(help="Of .bin files: auto, uint16 or uint32.")]
Separator = Annotated[int | None, typer.Option(help="The token that ends a document in token files.")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's files as well.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object at the end instead of lines.")]


def train(
    context: typer.Context,
    model: Model,
    data: Data,
    out: Out,
    steps: Annotated[int, typer.Option(help="How many in all.")] = 1000,
    schedule_steps: Annotated[int | None, typer.Option(help="Length of the schedule, if not --steps.")] = None,
    start_step: Annotated[int, typer.Option(help="Steps of the schedule that lie behind.")] = 0,
    tokenizer: Tokenizer = None,
    seqlen: Seqlen = 1024,
    batch: Batch = 8,
    micro_batch: MicroBatch = None,
    lr: Lr = 3e-4,
    warmup: Warmup = 0,
    schedule: Schedule = "cosine",
    min_lr_ratio: MinLrRatio = 0.1,
    weight_decay: WeightDecay = 0.1,
    beta2: Beta2 = 0.95,
    clip: Clip = 1.0,
    precision: Precision = "auto",
    compile: Compile = "off",
    attention: Attention = "hasten",
    recompute: Recompute = False,
    deterministic: Deterministic = False,
    seed: Seed = 0,
    eval_data: EvalData = None,
    eval_every: EvalEvery = 0,
    eval_rows: EvalRows = 64,
    log_every: LogEvery = 10,
    save_every: SaveEvery = 500,
    keep: Keep = 2,
    include: Include = "*",
    text_field: TextField = "text",
    token_dtype: TokenDtype = "auto",
    separator: Separator = None,
    tensorboard: Tensorboard = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a model on local data; the same command again resumes it where it stopped, to the bit."""
    config = make_config(context.params)
    with Display() as display:
        from hasten import train as training  # takes seconds: here, and not for --help

        training.train(config, display.listen)
    if display.end is not None:  # only the first of many processes is told
        print(json.dumps(asdict(display.end)) if as_json else "\n".join(summary(display.end)))


def make_config(given: dict[str, Any]) -> TrainConfig:
    """The configuration of a run from the options of a verb, by their names."""
    import transformers  # as above

    from hasten.train import DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig

    transformers.utils.logging.set_verbosity_error()  # what matters comes as an error of ours
    transformers.utils.logging.disable_progress_bar()
    same = ("model", "out", "steps", "batch", "micro_batch", "tokenizer", "precision", "attention", "compile")
    more = (
        "recompute",
        "deterministic",
        "seed",
        "device",
        "eval_rows",
        "eval_every",
        "log_every",
        "save_every",
        "keep",
        "tensorboard",
    )
    of_data = ("seqlen", "seed", "include", "text_field", "token_dtype", "separator")
    return TrainConfig(
        **{name: given[name] for name in (*same, *more)},
        data=DataConfig(paths=tuple(given["data"]), **{name: given[name] for name in of_data}),
        eval_data=tuple(given["eval_data"] or ()),
        schedule=ScheduleConfig(
            kind=given["schedule"],
            peak_lr=given["lr"],
            warmup_steps=given["warmup"],
            min_ratio=given["min_lr_ratio"],
            total_steps=max(1, given["steps"]) if given["schedule_steps"] is None else given["schedule_steps"],
            start_step=given["start_step"],
        ),
        optimizer=OptimizerConfig(weight_decay=given["weight_decay"], beta2=given["beta2"], clip_norm=given["clip"]),
    )


__all__ = ["train"]
