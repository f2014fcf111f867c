"""A run from its settings to its model: begun, or resumed where it stopped, to the bit.

`train` is what the command line calls. Everything it has to say goes to a listener as events; what it makes goes to the
run folder.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from hasten.errors import ArgumentError, CheckpointError
from hasten.ops import cost
from hasten.train import distributed, events, randomness
from hasten.train import model as model_module
from hasten.train.checkpoint import Checkpoints, Subject
from hasten.train.config import TrainConfig
from hasten.train.data import Plan, Rows, batches
from hasten.train.distributed import World
from hasten.train.events import Event, Finished, Listener, Readings
from hasten.train.files import only_one
from hasten.train.flops import step_flops
from hasten.train.log import Log, read
from hasten.train.run_folder import RunFolder, describe
from hasten.train.schedule import check_continued, lr_at
from hasten.train.step import Step


def train(config: TrainConfig, listen: Listener = lambda event: None) -> Finished:
    """Run to `config.steps`, from the last checkpoint in `config.out` if there is one; returns how it ended.

    Interrupted by SIGINT or SIGTERM (one process), it saves after the present step and returns. listen is told every
    event, in the first process. Raises ArgumentError for data and settings that cannot be, CheckpointError for a folder
    of another run and a last checkpoint that could not be written.
    """
    check_continued(config.schedule, config.steps)
    with ExitStack() as stack:
        world = stack.enter_context(distributed.join(config.device))
        stack.enter_context(_deterministic(config.deterministic))
        folder = RunFolder(config, world)
        if world.is_first:
            stack.enter_context(only_one(folder.path))
        world.wait()
        return _Run(config, world, folder, listen).run()


class _Run:
    """What a run holds while it goes."""

    def __init__(self, config: TrainConfig, world: World, folder: RunFolder, listen: Listener) -> None:
        self.config, self.world, self.folder, self._listen = config, world, folder, listen
        micro = config.micro_batch or max(1, config.batch // world.size)
        self.plan = Plan(batch=config.batch, micro_batch=micro, rank=world.rank, world=world.size)
        self.loaded = model_module.load(
            config.model, tokenizer=config.tokenizer, attention=config.attention, seed=config.seed
        )
        model = self.loaded.model
        folder.expect_ours(self.loaded.identity)
        vocab_size = model.get_input_embeddings().num_embeddings
        tokens, eval_tokens = folder.tokens(self.loaded.tokenizer, vocab_size, self.loaded.identity)
        self._expect_room(model)
        self.rows = Rows(tokens, config.data.seqlen, config.data.seed)
        self.eval_rows = None if eval_tokens is None else Rows(eval_tokens, config.data.seqlen, 0)
        self.flops = step_flops(model, config.batch, config.data.seqlen)
        self.num_parameters = sum(one.numel() for one in model.parameters())
        self.step = Step(model, config, world)
        self.subject = Subject(model, self.step.weights, self.step.optimizer, self.loaded.identity, self._describe)
        self.checkpoints = Checkpoints(folder.checkpoints, world, config.keep)
        self.readings = Readings(world.device)
        self.log: Log | None = None
        self.saved = 0
        self.last_loss: float | None = None
        randomness.seed_all(config.seed + world.rank)

    def run(self) -> Finished:
        started = time.perf_counter()
        try:
            return self._run(started)
        finally:
            if self.log is not None:
                self.log.close()

    def _run(self, started: float) -> Finished:
        begun, rows_taken = self.checkpoints.load(self.subject, lambda text: self.tell(events.Warned(text=text)))
        if self.world.is_first:
            self.log = Log(self.folder.path, begun, tensorboard=self.config.tensorboard)
        self.tell(self._started(begun))
        first = self._evaluate(0) if begun == 0 else self._logged("evaluated", 0)
        last = None
        self.saved = done = begun
        with closing(self._steps(begun, rows_taken)) as steps:
            for done in steps:
                last = self._after(done) or last
        is_whole = done >= self.config.steps
        if done > self.saved:
            self._save(done, is_last=True)
        model = self._export() if is_whole else None
        finished = Finished(
            step=done,
            is_whole=is_whole,
            loss=self._logged("stepped", -1) if self.last_loss is None else self.last_loss,
            eval_first=first,
            eval_last=self._logged("evaluated", -1) if last is None else last,
            seconds=time.perf_counter() - started,
            model=None if model is None else str(model),
        )
        self.tell(finished)
        return finished

    def tell(self, event: Event) -> None:
        if self.world.is_first:
            if self.log is not None:
                self.log.write(event)
            self._listen(event)

    def _steps(self, done: int, rows_taken: int) -> Generator[int, None, None]:
        """Make steps; yields the number of each when it is queued, until the last or until asked to stop."""
        config = self.config
        self._since = (time.perf_counter(), done)
        with _stop_asked(can_ask=self.world.size == 1) as is_asked:
            ahead = batches(self.rows, self.plan, rows_taken, config.steps - done, self.world.device)
            with closing(ahead):
                for step, made in enumerate(ahead, start=done):
                    self.readings.put(step + 1, self.step.train(made, lr_at(config.schedule, step)))
                    yield step + 1
                    if is_asked():
                        break

    def _after(self, done: int) -> float | None:
        """What is due after a step; returns the loss of an evaluation, if one was."""
        config = self.config
        self._report(wait=done == config.steps or done % config.save_every == 0)
        evaluated = None
        if done == config.steps or (config.eval_every and done % config.eval_every == 0):
            evaluated = self._evaluate(done)
        if done % config.save_every == 0:
            self._save(done, is_last=done == config.steps)
        return evaluated

    def _report(self, *, wait: bool) -> None:
        for step, values in self.readings.take(wait=wait):
            loss, norm = values
            if not events.is_sound(values):
                stands = f"the checkpoint of step {self.saved} stands" if self.saved else "there is no checkpoint yet"
                hint = f"lower --lr or --clip, or look at the data; {stands}"
                raise ArgumentError("lr", "a rate at which the loss stays finite", f"{loss} in step {step}", hint)
            self.last_loss = loss
            if step % self.config.log_every == 0 or step == self.config.steps:
                self.tell(self._stepped(step, loss, norm))

    def _stepped(self, step: int, loss: float, norm: float) -> events.Stepped:
        now = time.perf_counter()
        step_s = (now - self._since[0]) / max(1, step - self._since[1])
        self._since = (now, step)
        peak = None
        if self.world.device.type == "cuda":
            peak = cost.datasheet_rates(torch.cuda.get_device_name(self.world.device))
        rate = None if peak is None else peak.flops_per_s * self.world.size * step_s
        return events.Stepped(
            step=step,
            loss=loss,
            lr=lr_at(self.config.schedule, step - 1),
            grad_norm=norm,
            tokens_per_s=self.config.batch * self.config.data.seqlen / step_s,
            step_s=step_s,
            left_s=(self.config.steps - step) * step_s,
            mfu=None if rate is None else self.flops.exact / rate,
            mfu_palm=None if rate is None else self.flops.palm / rate,
        )

    def _evaluate(self, done: int) -> float | None:
        if self.eval_rows is None:
            return None
        loss, count = self.step.evaluate(self.eval_rows, self.plan, self.config.eval_rows)
        self.tell(events.Evaluated(step=done, loss=loss, num_labels=count))
        return loss

    def _save(self, done: int, *, is_last: bool) -> None:
        """Save; one that fails is a warning while there are steps left, since a later one may succeed."""
        began = time.perf_counter()
        self._report(wait=True)
        try:
            path = self.checkpoints.save(done, done * self.config.batch, self.subject)
        except CheckpointError as error:
            if is_last:
                raise
            self.tell(events.Warned(text=str(error)))
            return
        self.saved = done
        self.tell(events.Saved(step=done, path=str(path), seconds=time.perf_counter() - began))

    def _export(self) -> Path | None:
        """The model as transformers writes it, in the dtype of the checkpoint it began from."""
        model = self.loaded.model
        if self.world.size > 1:
            state = distributed.full_weights(model)
        else:
            state = self.subject.model_tensors()
        if not self.world.is_first:
            return None
        once = self.subject.model_tensors()  # tied weights under one name
        dtype = self.loaded.dtype
        state = {name: state[name].to(dtype) if one.is_floating_point() else state[name] for name, one in once.items()}
        try:
            return self.folder.export(self.loaded, state)
        except OSError as error:
            problem = f"the model was not written: {error.strerror or error}"
            raise CheckpointError(self.folder.model, problem, "free some room, then repeat the command") from error

    def _describe(self, folder: Path) -> None:
        describe(self.loaded, folder)

    def _started(self, done: int) -> events.Started:
        return events.Started(
            step=done,
            steps=self.config.steps,
            num_parameters=self.num_parameters,
            num_tokens=self.rows.tokens.num_tokens,
            rows_per_epoch=self.rows.rows_per_epoch,
            processes=self.world.size,
            device=str(self.world.device),
            precision=self.step.precision,
            attention=self.loaded.attention,
            loss="linear + cross-entropy, chunked" if self.step.language.is_fused else "cross-entropy of logits",
        )

    def _logged(self, kind: str, place: int) -> float | None:
        """The first (0) or last (-1) loss of a kind in the log, which has those before a resumption too."""
        found = [line["loss"] for line in read(self.folder.path) if line["kind"] == kind]
        return found[place] if found else None

    def _expect_room(self, model: Any) -> None:
        """Raise ArgumentError for rows longer than the positions of a model that has a table of them."""
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and self.config.data.seqlen > longest:
            got = f"{self.config.data.seqlen}"
            raise ArgumentError("seqlen", f"at most the model's {longest} positions", got, "give a smaller --seqlen")


@contextmanager
def _deterministic(is_asked: bool) -> Iterator[None]:
    """Have torch take operations that always give the same bits, and warn of those that have none; then as before."""
    before, was_warning = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(before or is_asked, warn_only=was_warning or not before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=was_warning)


@contextmanager
def _stop_asked(*, can_ask: bool) -> Iterator[Any]:
    """A function that tells whether SIGINT or SIGTERM came; the second one does what it always does."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    if can_ask and threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
