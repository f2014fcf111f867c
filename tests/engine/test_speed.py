"""How fast the built-in model decodes on a CPU beside transformers' `generate`, and what the cache saves.

Times are CPU seconds of this thread with one PyTorch thread, so that a busy machine does not decide. `-s` shows
the figures: python -m pytest -m slow tests/engine/test_speed.py -s
"""

from __future__ import annotations

import itertools
import statistics
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from hasten.engine import Runner, load
from hasten.models import builtin

pytestmark = pytest.mark.slow
NEW, ROUNDS, FIRST = 40, 3, 4  # the first steps warm up, on either side


class Clock:
    """Notes the time of every token; has what transformers asks of a streamer."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value=None) -> None:
        self.times.append(time.thread_time())

    def end(self) -> None:
        pass

    def seconds(self) -> list[float]:
        times = self.times[FIRST:]
        return [after - before for before, after in itertools.pairwise(times)]


def by_transformers(model, ids):
    clock = Clock()
    given = torch.tensor([ids])
    model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False, streamer=clock)
    return clock.seconds()


def by_hasten(runner, ids, new=NEW):
    clock = Clock()
    token = int(runner.begin(ids, [], new).argmax())
    for _ in range(new):
        clock.put()
        token = int(runner.next(token).argmax())
    return clock.seconds()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def median_ms(seconds):
    return statistics.median(seconds) * 1e3


@pytest.mark.parametrize("length", [16, 1000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_beside_transformers(one_thread, dtype, length):
    theirs = AutoModelForCausalLM.from_pretrained(builtin.path(), dtype=dtype).eval()
    theirs.generation_config.eos_token_id = None
    runner = Runner(load(builtin.path(), device="cpu", dtype=dtype).model, may_lay_out=True)
    runner.warm_up()
    ids = torch.randint(3, 4096, (length,)).tolist()
    found: dict[str, list[float]] = {"transformers": [], "hasten": []}
    for _ in range(ROUNDS):  # interleaved, so that a slow minute is everybody's
        found["transformers"] += by_transformers(theirs, ids)
        found["hasten"] += by_hasten(runner, ids)
    theirs_ms, ours_ms = median_ms(found["transformers"]), median_ms(found["hasten"])
    print(f"\n{dtype}, {length} tokens of context: {theirs_ms:.2f} ms a token by transformers, {ours_ms:.2f} by hasten")
    assert runner.path == "recorded step"
    assert theirs_ms / ours_ms > 1.3


def test_what_the_cache_saves_at_1000_tokens(one_thread):
    model = load(builtin.path(), device="cpu").model
    ids = torch.randint(3, 4096, (1000,)).tolist()
    cached, bare = Runner(model, may_lay_out=True), Runner(model, use_cache=False)
    cached.warm_up()
    with_ms, without_ms = median_ms(by_hasten(cached, ids)), median_ms(by_hasten(bare, ids, new=FIRST + 3))
    print(f"\nfloat32, 1000 tokens of context: {with_ms:.2f} ms a token with the cache, {without_ms:.1f} without")
    assert without_ms / with_ms > 10
