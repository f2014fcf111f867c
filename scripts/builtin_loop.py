"""The training loop of the built-in model: crops, loss, optimizers, and a schedule driven by the clock.

Called by `train_builtin.py`. The learning rate is a function of the elapsed share of a time budget, so the
schedule ends properly on any machine. Knows nothing of files except through the `save` it is given.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from builtin_data import BOS
from torch import Tensor, nn

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

# A prompt is usually a fragment, not a file from its first line on: these open a fragment.
STATEMENT_TOKENS = ("def", "class", "@", "async")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Shares of the time budget: warm-up, constant rate, linear decay to zero; short crops, then long ones."""

    seconds: float
    peak_lr: float
    batch_tokens: int
    seqlen: int
    long_seqlen: int
    warmup: float = 0.02
    decay_from: float = 0.4
    long_from: float = 0.82
    checkpoints: tuple[float, ...] = (0.25, 0.5, 0.75)

    def within(self, seconds: float) -> "Schedule":
        """The same schedule, in no more than `seconds`; a late start still leaves one second."""
        return replace(self, seconds=max(1.0, min(self.seconds, seconds)))

    def lr(self, elapsed: float) -> float:
        decay = (1 - elapsed) / (1 - self.decay_from)
        return self.peak_lr * max(0.0, min(1.0, elapsed / self.warmup, decay))

    def seqlen_at(self, elapsed: float) -> int:
        return self.seqlen if elapsed < self.long_from else self.long_seqlen


@dataclass
class Progress:
    """What the run did so far; `history` holds (elapsed share, training loss)."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[tuple[float, float]] = field(default_factory=list)


class Crops:
    """Random crops of a token stream that lives on the device."""

    def __init__(self, tokens: Tensor, vocab: dict[str, int], max_seqlen: int) -> None:
        self.tokens = tokens  # (num_tokens,) int32
        self.last = tokens.numel() - max_seqlen - 1
        opens = torch.zeros(len(vocab), dtype=torch.bool, device=tokens.device)
        opens[[vocab[token] for token in STATEMENT_TOKENS if token in vocab]] = True
        newline = torch.zeros_like(opens)
        newline[[index for token, index in vocab.items() if set(token) == {"Ċ"}]] = True  # byte-level BPE's "\n"
        here = opens[tokens[1 : self.last].long()] & newline[tokens[: self.last - 1].long()]
        self.statements = here.nonzero().flatten()  # position before each top-level statement

    def batch(self, rows: int, seqlen: int) -> Tensor:
        """(rows, seqlen + 1) int64; half of the rows begin at a statement, with bos before it."""
        device, half = self.tokens.device, rows // 2
        begin = torch.randint(self.last, (rows,), device=device)
        begin[:half] = self.statements[torch.randint(self.statements.numel(), (half,), device=device)]
        crops = self.tokens[begin[:, None] + torch.arange(seqlen + 1, device=device)].long()
        crops[:half, 0] = BOS
        return crops


def make_loss(model: nn.Module) -> LossFunction:
    """Mean next-token loss of (rows, seqlen + 1) tokens, given the rotary tables of that length.

    Runs the model's own layers in order, without the mask preparation around them (every row is causal and
    full), so that it compiles into one graph.
    """
    decoder: Any = model.model

    def loss(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        hidden = decoder.embed_tokens(tokens[:, :-1])  # (rows, seqlen, hidden)
        for layer in decoder.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=(cos, sin))
        logits = model.lm_head(decoder.norm(hidden))  # (rows, seqlen, vocab)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return loss


def rotary_tables(model: nn.Module, seqlen: int, device: torch.device) -> tuple[Tensor, Tensor]:
    positions = torch.arange(seqlen, device=device)[None]
    tables: tuple[Tensor, Tensor] = model.model.rotary_emb(torch.zeros(1, device=device), positions)
    return tables


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) for matrices, all of one shape in one batch; the update has the size of an AdamW update.

    The batch is the reason not to use `torch.optim.Muon`: one matrix at a time, 56 small matrices cost more
    in launches than the products take.
    """

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for param in params:
            by_shape.setdefault(tuple(param.shape), []).append(param)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params, momentum = group["params"], group["momentum"]
            grad = torch.stack([param.grad for param in params])  # (num, rows, columns)
            average = self.state[params[0]].setdefault("average", torch.zeros_like(grad))
            average.lerp_(grad, 1 - momentum)
            update = orthogonalize(grad.lerp(average, momentum))
            scale = 0.2 * math.sqrt(max(grad.shape[-2:]))  # a root mean square of 0.2, as AdamW's (Liu 2025)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.to(grad.dtype).unbind()), alpha=-group["lr"] * scale)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of each (rows, columns) matrix to about 1 by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def make_optimizers(model: nn.Module, kind: str, lr: float, fused: bool) -> list[torch.optim.Optimizer]:
    """Optimizers over all parameters; a group's `share` is the part of the scheduled rate that it gets."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]  # the tied embedding and the norms
    options: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-10, "fused": fused}
    if kind == "muon":
        return [Muon(matrices, lr), torch.optim.AdamW([{"params": rest, "share": 0.6}], weight_decay=0.0, **options)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, **options)]


class Trainer:
    """One model on one device: loss (compiled if that works), gradients in micro-batches, optimizer step."""

    def __init__(self, model: nn.Module, schedule: Schedule, optimizer: str, compile_loss: bool) -> None:
        self.model, self.schedule = model, schedule
        self.device = next(model.parameters()).device
        self.is_cuda = self.device.type == "cuda"
        self.loss = make_loss(model)
        self.micro_batches = 1
        self.optimizers = make_optimizers(model, optimizer, schedule.peak_lr, fused=self.is_cuda)
        lengths = (schedule.seqlen, schedule.long_seqlen)
        self.tables = {seqlen: rotary_tables(model, seqlen, self.device) for seqlen in lengths}
        self.is_compiled = compile_loss
        if compile_loss:
            self.loss = torch.compile(self.loss, dynamic=False)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.is_cuda)

    def rows(self, seqlen: int) -> int:
        return max(2, self.schedule.batch_tokens // seqlen)

    def backward(self, tokens: Tensor) -> Tensor:
        """Gradients of the mean loss over all rows; returns that loss, still on the device."""
        total = torch.zeros((), device=self.device)
        chunks = tokens.chunk(self.micro_batches)
        for chunk in chunks:
            with self.autocast():
                loss = self.loss(chunk, *self.tables[tokens.shape[1] - 1]) / len(chunks)
            loss.backward()
            total += loss.detach()
        return total

    def warm_up(self) -> None:
        """Compile for both sequence lengths; if the compiler fails, go on without it, and say so."""
        for seqlen in (self.schedule.seqlen, self.schedule.long_seqlen):
            try:
                self.time_one(seqlen)
            except Exception as error:
                if not self.is_compiled:
                    raise
                print(f"torch.compile failed ({type(error).__name__}: {str(error)[:300]}); going on in eager mode")
                # Eager mode keeps every intermediate: a quarter of the batch at a time fits where the whole may not.
                self.loss, self.is_compiled, self.micro_batches = make_loss(self.model), False, 4
                self.model.zero_grad(set_to_none=True)
                self.time_one(seqlen)

    def time_one(self, seqlen: int) -> None:
        tokens = torch.randint(self.model.config.vocab_size, (self.rows(seqlen), seqlen + 1), device=self.device)
        start = time.perf_counter()
        float(self.backward(tokens))
        middle = time.perf_counter()
        float(self.backward(tokens))
        speed = tokens.shape[0] * seqlen / (time.perf_counter() - middle)
        self.model.zero_grad(set_to_none=True)
        print(f"seqlen {seqlen}: ready in {middle - start:.1f} s, {speed / 1e3:.0f} k tokens/s", flush=True)

    def step(self, tokens: Tensor, lr: float) -> Tensor:
        loss = self.backward(tokens)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("share", 1.0)
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return loss

    def run(self, crops: Crops, save: Callable[[Progress], None]) -> Progress:
        """Train until the budget is used up; `save` is called at each checkpoint share and at the end."""
        progress, start = Progress(), time.perf_counter()
        pending = list(self.schedule.checkpoints)
        throttle, log = self.throttle(), Log()
        while (elapsed := (time.perf_counter() - start) / self.schedule.seconds) < 1:
            if pending and elapsed >= pending[0]:
                pending.pop(0)
                progress.seconds = time.perf_counter() - start
                save(progress)
            seqlen, lr = self.schedule.seqlen_at(elapsed), self.schedule.lr(elapsed)
            loss = self.step(crops.batch(self.rows(seqlen), seqlen), lr)
            progress.step += 1
            progress.tokens += self.rows(seqlen) * seqlen
            next(throttle)
            log.add(progress, loss, elapsed, f"seqlen {seqlen} lr {lr:.2e}")
        progress.seconds = time.perf_counter() - start
        save(progress)
        return progress

    def throttle(self) -> Iterator[None]:
        """Let the host run at most two steps ahead of the device: the clock must not race ahead of the work."""
        events: deque[torch.cuda.Event] = deque()
        while True:
            if self.is_cuda:
                events.append(torch.cuda.Event())
                events[-1].record()
                if len(events) > 2:
                    events.popleft().synchronize()
            yield


class Log:
    """A line every five seconds: the only point where the loss is read from the device."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.printed, self.tokens = time.perf_counter(), 0

    def add(self, progress: Progress, loss: Tensor, elapsed: float, note: str) -> None:
        self.losses.append(loss)
        now = time.perf_counter()
        if now - self.printed < 5:
            return
        mean = float(torch.stack(self.losses).mean())
        if not math.isfinite(mean):
            raise SystemExit(f"the loss is {mean} at step {progress.step}; lower --lr, or take --optimizer adamw")
        speed = (progress.tokens - self.tokens) / (now - self.printed)
        progress.history.append((round(elapsed, 4), round(mean, 4)))
        print(f"{elapsed:6.1%} step {progress.step} loss {mean:.4f} {note} {speed / 1e3:.0f} k tokens/s", flush=True)
        self.losses, self.printed, self.tokens = [], now, progress.tokens
