"""How much 16 requests at a time gain on a CPU over the fastest way for one after another, the recorded step.

Times are CPU seconds of this thread with one PyTorch thread, interleaved. `-s` shows the figures:
python -m pytest -m slow tests/engine/test_engine_speed.py -s
"""

from __future__ import annotations

import time

import pytest
import torch

from hasten.engine import Engine, Runner, Sampling, generate, load
from hasten.models import builtin

pytestmark = pytest.mark.slow
NUM_REQUESTS, NEW, ROUNDS = 16, 64, 3


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("context", [16, 256])
def test_16_requests_at_a_time_against_one_after_another(one_thread, context):
    checkpoint, other = (load(builtin.path(), device="cpu") for _ in range(2))
    for one in (checkpoint, other):
        one.model.generation_config.eos_token_id = None
    words = checkpoint.tokenizer("def add(a, b):\n    return a + b\n\n" * 40)["input_ids"]
    prompts = [words[place : place + context] for place in range(NUM_REQUESTS)]
    sampling = Sampling(max_tokens=NEW)
    runner = Runner(other.model, may_lay_out=True, step_threads=1)
    runner.warm_up()
    engine = Engine(checkpoint.model, checkpoint.tokenizer)
    core = engine._core

    def one_after_another():
        return [list(generate(runner, other.tokenizer, prompt, sampling))[-1].token_ids for prompt in prompts]

    def at_a_time():
        requests = [engine._request(prompt, sampling, None) for prompt in prompts]
        for request in requests:
            core.add(request)
        while not core.is_idle:
            core.step()
        return [tuple(request.choices[0].answer.tokens) for request in requests]

    seconds = {one_after_another: [], at_a_time: []}
    found = {}
    for round_ in range(ROUNDS + 1):
        for way, times in seconds.items():
            start = time.thread_time()
            found[way] = way()
            if round_:
                times.append(time.thread_time() - start)
    engine.close()
    assert found[at_a_time] == found[one_after_another]
    slow, fast = (min(times) for times in seconds.values())
    total = NUM_REQUESTS * NEW
    print(
        f"\nprompts of {context}, {NUM_REQUESTS} requests of {NEW} tokens: "
        f"one after another {total / slow:,.0f} tokens/s, at a time {total / fast:,.0f}, {slow / fast:.2f} times"
    )
    assert slow / fast > (3.5 if context == 16 else 1.4)
