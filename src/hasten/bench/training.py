"""The training suite: a step of a whole model, forward, backward and optimizer, with each attention.

Models are transformers' own, built from a configuration with random weights; nothing is downloaded. The time is
the wall clock of a step, host included, because that is what a user waits for.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hasten.bench import machine, records
from hasten.bench.ceilings import measure_ceilings
from hasten.bench.problems import dtype_name
from hasten.bench.records import Record
from hasten.bench.timing import clock_for
from hasten.errors import ArgumentError
from hasten.masks import Causal
from hasten.models import accelerate
from hasten.ops import cost
from hasten.ops.cost import Rates

ATTENTIONS = ("eager", "sdpa", "hasten")
DEFAULTS: dict[str, dict[str, str]] = {
    "cuda": {"models": "gpt2-124m,llama-1.1b", "shapes": "8x1024,4x4096", "dtype": "bf16"},
    "cpu": {"models": "tiny", "shapes": "2x128", "dtype": "fp32"},
}
_WARM_UP = 3
_LARGEST_DIFFERENCE = 0.1  # of the first layer's attention gradients, between two attentions in 16 bits; a lost
# mask gives about 1, and rounding in GPT-2 about 0.01


def _gpt2(length: int, **others: int | None) -> transformers.PreTrainedConfig:
    """Without dropout, which no two attentions would draw alike."""
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2Config(
        n_positions=max(1024, length), use_cache=False, loss_type="ForCausalLM", **dropout, **others
    )


def _llama(length: int) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(
        vocab_size=32768,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=max(4096, length),
        use_cache=False,
    )


#: name -> configuration for a length
MODELS: dict[str, Callable[[int], transformers.PreTrainedConfig]] = {
    "gpt2-124m": _gpt2,
    "llama-1.1b": _llama,
    "tiny": lambda length: _gpt2(
        length, n_embd=64, n_layer=2, n_head=4, vocab_size=512, bos_token_id=None, eos_token_id=None
    ),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure: every model in every shape (batch, length) with every attention, compiled or not."""

    models: Sequence[str]
    shapes: Sequence[tuple[int, int]]
    attentions: Sequence[str]
    dtype: torch.dtype
    device: torch.device
    compiles: Sequence[bool] = (False,)
    steps: int = 10
    commit: str | None = None

    def __post_init__(self) -> None:
        for argument, names, known in (
            ("model", self.models, tuple(MODELS)),
            ("attention", self.attentions, ATTENTIONS),
        ):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise ArgumentError(argument, f"some of {', '.join(known)}", repr(unknown[0]), "separate by commas")


@dataclass(frozen=True)
class Variant:
    """One way to train one model."""

    model: str
    batch: int
    seqlen: int
    attention: str
    is_compiled: bool

    @property
    def name(self) -> str:
        return self.attention + ("+compile" if self.is_compiled else "")


@dataclass(frozen=True)
class Measured:
    """Seconds of each timed step, of the first one, and what tells whether the attention was right."""

    step_s: tuple[float, ...]
    first_step_s: float
    loss: float
    attention_grad: Tensor
    flops: int
    peak_bytes: int | None


def parse_shape(text: str) -> tuple[int, int]:
    """Read "8x1024" as (batch, length); raises ArgumentError."""
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ArgumentError("shape", "BATCHxLENGTH such as 8x1024", repr(text), "separate several by commas")
    return int(sizes[0]), int(sizes[1])


def run(options: Options, emit: Callable[[list[Record]], None], tell: Callable[[str], None]) -> None:
    """Measure all variants; `emit` gets each record when it is made, `tell` a line of progress.

    The first attention that runs is what the others are held to: where gradients differ by more than rounding
    the variant is "wrong" and has no time.
    """
    place = records.environment(options.device, options.commit) | {"transformers": transformers.__version__}
    rates, _ = measure_ceilings(options.device, options.dtype, clock_for(options.device))
    place |= records.ceiling_fields(rates)
    for model in options.models:
        for batch, seqlen in options.shapes:
            truth: Tensor | None = None
            for is_compiled in options.compiles:
                for attention in options.attentions:
                    variant = Variant(model, batch, seqlen, attention, is_compiled)
                    record, grad = measure_variant(variant, options, rates, truth)
                    truth = grad if truth is None else truth
                    emit([{"kind": "training", **place, **record}])
                    tell(f"{model} {batch}x{seqlen} {variant.name}: {_summary(record)}")


def measure_variant(
    variant: Variant, options: Options, rates: Rates, truth: Tensor | None
) -> tuple[Record, Tensor | None]:
    """The record of one variant without the place, and its attention gradients if it ran."""
    record: Record = {
        "model": variant.model,
        "batch": variant.batch,
        "seqlen": variant.seqlen,
        "dtype": dtype_name(options.dtype),
        "implementation": variant.name,
    }
    try:
        measured = _measure(variant, options)
    except torch.OutOfMemoryError:
        return record | {"status": "out of memory"}, None
    except Exception as error:  # noqa: BLE001 - a model that breaks is a result, and the next one must have its turn
        return record | {"status": "failed", "reason": " ".join(str(error).split())[:300]}, None
    finally:
        _release(options.device, variant.is_compiled)
    record |= {"loss": round(measured.loss, 4), "first_step_s": round(measured.first_step_s, 3)}
    if truth is not None:
        difference = float((measured.attention_grad - truth).norm() / truth.norm())
        record["grad_difference"] = float(f"{difference:.3g}")
        if not difference <= _LARGEST_DIFFERENCE:
            return record | {"status": "wrong"}, None
    return record | {"status": "ok", **_figures(variant, measured, options.device, rates)}, measured.attention_grad


def _measure(variant: Variant, options: Options) -> Measured:
    device, clock = options.device, clock_for(options.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = build(variant, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    trained: Any = torch.compile(model) if variant.is_compiled else model
    ids = torch.randint(model.config.vocab_size, (variant.batch, variant.seqlen), device=device)
    is_mixed = options.dtype.itemsize == 2
    losses: list[float] = []

    def step(is_first: bool = False) -> Tensor:
        with torch.autocast(device.type, options.dtype) if is_mixed else nullcontext():
            loss: Tensor = trained(input_ids=ids, labels=ids).loss
        loss.backward()
        if not is_first:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    first_step_s = clock.wall_s(lambda: losses.append(step(is_first=True).item()))
    attention_grad = _attention_grad(model)
    optimizer.zero_grad(set_to_none=True)
    for _ in range(_WARM_UP):
        step()
    times = tuple(clock.wall_s(step) for _ in range(options.steps))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    flops = step_flops(model, variant.batch, variant.seqlen)
    return Measured(times, first_step_s, losses[0], attention_grad, flops, peak)


def build(variant: Variant, device: torch.device) -> Any:
    """The model of a variant on a device, float32, in training mode, the same weights every time."""
    torch.manual_seed(0)
    config = MODELS[variant.model](variant.seqlen)
    is_ours = variant.attention == "hasten"
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa" if is_ours else variant.attention
        )
    model = model.to(torch.float32).train()
    return accelerate(model) if is_ours else model


def step_flops(model: Any, batch: int, seqlen: int) -> int:
    """FLOPs a training step needs, none counted twice: 6 a token for each weight that is multiplied, and attention.

    The backward counts as twice the forward, causal cells exactly; recomputation is not work done. The table of
    input embeddings is looked up, not multiplied; the output one counts, also where it is the same table.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = sum(weight.numel() for weight in model.parameters() if id(weight) not in tables)
    output = model.get_output_embeddings().weight
    weights += output.numel() if id(output) in tables else 0
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = cost.visible_pairs(Causal(), batch, config.num_attention_heads, seqlen, seqlen)
    attention = 3 * cost.forward_flops(pairs, head_dim, head_dim) * config.num_hidden_layers
    return 6 * int(weights) * batch * seqlen + attention


def _attention_grad(model: nn.Module) -> Tensor:
    """Gradients of the weights of the first layer's attention, flat, float32, on the CPU."""
    named = {name: weight.grad for name, weight in model.named_parameters() if ".0." in name and "attn" in name}
    grads = [grad.detach().flatten().float().cpu() for grad in named.values() if grad is not None]
    assert grads, "no weights of a first attention layer"
    return torch.cat(grads)


def _figures(variant: Variant, measured: Measured, device: torch.device, rates: Rates) -> Record:
    seconds = statistics.median(measured.step_s)
    rate = measured.flops / seconds
    sheet = cost.datasheet_rates(machine.device_name(device)) if device.type == "cuda" else None
    return {
        "median_ms": float(f"{seconds * 1e3:.5g}"),
        "min_ms": float(f"{min(measured.step_s) * 1e3:.5g}"),
        "max_ms": float(f"{max(measured.step_s) * 1e3:.5g}"),
        "n": len(measured.step_s),
        "tokens_per_s": round(variant.batch * variant.seqlen / seconds, 1),
        "tflops": float(f"{rate / 1e12:.4g}"),
        "share_of_ceiling": round(rate / rates.flops_per_s, 4),
        "mfu": round(rate / sheet.flops_per_s, 4) if sheet else None,
        "peak_gb": None if measured.peak_bytes is None else round(measured.peak_bytes / 1e9, 2),
    }


def _release(device: torch.device, was_compiled: bool) -> None:
    if was_compiled:
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _summary(record: Record) -> str:
    if record["status"] != "ok":
        return str(record["status"])
    memory = "" if record["peak_gb"] is None else f", {record['peak_gb']} GB"
    return f"{record['median_ms']} ms, {record['tokens_per_s']:.0f} tokens/s, {record['tflops']} TFLOP/s{memory}"
