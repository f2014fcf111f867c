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
from hasten.models import accelerate
from hasten.ops import cost
from hasten.ops.cost import Rates
from hasten.train.flops import StepFlops, step_flops
from hasten.train.loss import IGNORED
from hasten.train.model import LanguageModel

#: what serves attention; "hasten-train" is hasten's with the loss of `hasten train`, which makes no whole logits
ATTENTIONS = ("eager", "sdpa", "hasten", "hasten-train")
COMPILES = ("off", "default", "reduce-overhead", "max-autotune")
DEFAULTS: dict[str, dict[str, str]] = {
    "cuda": {"models": "gpt2-124m,gpt2-355m,llama-1.4b,bert-large", "dtype": "bf16"},
    "cpu": {"models": "tiny", "dtype": "fp32"},
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


def _llama_1b4(length: int) -> transformers.PreTrainedConfig:
    """1.42 billion weights, multi-head: the shape of GPT-3 1.3B (24 layers of 2,048, 16 heads) as a Llama."""
    return transformers.LlamaConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=24,
        num_attention_heads=16,
        max_position_embeddings=max(8192, length),
        use_cache=False,
    )


def _bert_large(length: int) -> transformers.PreTrainedConfig:
    return transformers.BertConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        max_position_embeddings=max(512, length),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


#: name -> configuration for a length
MODELS: dict[str, Callable[[int], transformers.PreTrainedConfig]] = {
    "gpt2-124m": _gpt2,
    "gpt2-355m": lambda length: _gpt2(length, n_embd=1024, n_layer=24, n_head=16),
    "gpt-1.3b": lambda length: _gpt2(length, n_embd=2048, n_layer=24, n_head=16),
    "llama-1.1b": _llama,
    "llama-1.4b": _llama_1b4,
    "bert-large": _bert_large,
    "tiny": lambda length: _gpt2(
        length, n_embd=64, n_layer=2, n_head=4, vocab_size=512, bos_token_id=None, eos_token_id=None
    ),
}

#: (batch, length) of a model when none are asked for: those of the papers, as large as 80 GB hold
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "gpt2-124m": ((32, 1024), (8, 4096)),
    "gpt2-355m": ((16, 1024),),
    "gpt-1.3b": ((4, 2048), (1, 8192)),
    "llama-1.1b": ((8, 1024), (4, 4096)),
    "llama-1.4b": ((4, 2048), (1, 8192)),
    "bert-large": ((32, 512),),
    "tiny": ((2, 128),),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure: every model in every shape (batch, length) with every attention, compiled or not.

    shapes: none means each model's own, `SHAPES`. compiles: some of `COMPILES`, each a mode of torch.compile.
    """

    models: Sequence[str]
    attentions: Sequence[str]
    dtype: torch.dtype
    device: torch.device
    shapes: Sequence[tuple[int, int]] = ()
    compiles: Sequence[str] = ("off",)
    steps: int = 10
    commit: str | None = None

    def __post_init__(self) -> None:
        for argument, names, known in (
            ("model", self.models, tuple(MODELS)),
            ("attention", self.attentions, ATTENTIONS),
            ("compile", self.compiles, COMPILES),
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
    compile: str = "off"

    @property
    def name(self) -> str:
        return self.attention + {"off": "", "default": "+compile"}.get(self.compile, f"+{self.compile}")


@dataclass(frozen=True)
class Measured:
    """Seconds of each timed step, of the first one, and what tells whether the attention was right."""

    step_s: tuple[float, ...]
    first_step_s: float
    loss: float
    attention_grad: Tensor
    flops: StepFlops
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
        for batch, seqlen in options.shapes or SHAPES[model]:
            truth: Tensor | None = None
            for compile_mode in options.compiles:
                for attention in options.attentions:
                    variant = Variant(model, batch, seqlen, attention, compile_mode)
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
        _release(options.device, variant.compile != "off")
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
    loss_of = _loss_of(model, variant)
    ids = torch.randint(model.config.vocab_size, (variant.batch, variant.seqlen), device=device)
    is_mixed = options.dtype.itemsize == 2
    losses: list[float] = []

    def step(is_first: bool = False) -> Tensor:
        with torch.autocast(device.type, options.dtype) if is_mixed else nullcontext():
            loss = loss_of(ids)
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
    flops = step_flops(model, variant.batch, variant.seqlen, is_causal=_is_causal(model.config))
    return Measured(times, first_step_s, losses[0], attention_grad, flops, peak)


def build(variant: Variant, device: torch.device) -> Any:
    """The model of a variant on a device, float32, in training mode, the same weights every time."""
    torch.manual_seed(0)
    config = MODELS[variant.model](variant.seqlen)
    is_ours = variant.attention.startswith("hasten")
    kind = transformers.AutoModelForCausalLM if _is_causal(config) else transformers.AutoModelForMaskedLM
    with torch.device(device):
        model = kind.from_config(config, attn_implementation="sdpa" if is_ours else variant.attention)
    model = model.to(torch.float32).train()
    return accelerate(model) if is_ours else model


def _loss_of(model: Any, variant: Variant) -> Callable[[Tensor], Tensor]:
    """The mean loss of ids (batch, seqlen) as a variant computes it: through the model, or without whole logits."""
    mode = None if variant.compile == "default" else variant.compile
    is_compiled, marks_steps = variant.compile != "off", mode in ("reduce-overhead", "max-autotune")
    if variant.attention == "hasten-train":
        if not _is_causal(model.config):
            raise ArgumentError("attention", "hasten for an encoder", "'hasten-train'", "its loss is of causal models")
        language = LanguageModel(model)
    run_model: Any = language if variant.attention == "hasten-train" else model
    run_model = torch.compile(run_model, mode=mode, dynamic=False) if is_compiled else run_model

    def loss_of(ids: Tensor) -> Tensor:
        if marks_steps:  # CUDA graphs: what the last step returned may be written over
            torch.compiler.cudagraph_mark_step_begin()
        if variant.attention != "hasten-train":
            loss: Tensor = run_model(input_ids=ids, labels=ids).loss
            return loss
        labels = nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        total: Tensor = run_model(ids, positions, labels)
        return total / (ids.numel() - ids.shape[0])

    return loss_of


def _is_causal(config: Any) -> bool:
    return config.model_type != "bert"


def _attention_grad(model: nn.Module) -> Tensor:
    """Gradients of the weights of the first layer's attention, flat, float32, on the CPU."""
    named = {name: weight.grad for name, weight in model.named_parameters() if ".0." in name and "att" in name}
    grads = [grad.detach().flatten().float().cpu() for grad in named.values() if grad is not None]
    assert grads, "no weights of a first attention layer"
    return torch.cat(grads)


def _figures(variant: Variant, measured: Measured, device: torch.device, rates: Rates) -> Record:
    seconds = statistics.median(measured.step_s)
    rate = measured.flops.exact / seconds
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
        "mfu_palm": round(measured.flops.palm / seconds / sheet.flops_per_s, 4) if sheet else None,
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
