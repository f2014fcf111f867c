"""`/v1/completions` through the official client: the engine's own tokens, every field, and errors by their names."""

from __future__ import annotations

import threading

import httpx2
import openai
import pytest

from hasten.engine import Sampling
from hasten.serve.app import Limits
from tests.engine.tiny_checkpoints import TOKENIZER
from tests.serve.serving import NAME, client, engine, serving, wait

PROMPT = "def add(a, b):"
IDS = TOKENIZER(PROMPT)["input_ids"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with engine(tmp_path_factory.mktemp("checkpoint")) as one:
        yield one


@pytest.fixture(scope="module")
def address(made):
    with serving(made) as one:
        yield one


@pytest.fixture(scope="module")
def ask(address):
    with client(address) as one:
        yield lambda prompt=PROMPT, **options: one.completions.create(model=NAME, prompt=prompt, **options)


def texts(made, prompts=(PROMPT,), **options):
    return [one.text for one in made.generate(list(prompts), Sampling(**options))]


def test_health_and_models(address):
    assert httpx2.get(f"{address}/health").json() == {"status": "ok", "num_running": 0, "num_waiting": 0}
    with client(address) as one:
        assert [model.id for model in one.models.list()] == [NAME]
        assert one.models.retrieve(NAME).owned_by == "hasten"
        with pytest.raises(openai.NotFoundError):
            one.models.retrieve("other")


@pytest.mark.parametrize("prompt", [PROMPT, IDS], ids=["text", "ids"])
def test_the_text_is_the_engines_own(made, ask, prompt):
    answer = ask(prompt, temperature=0, max_tokens=12)
    assert [one.text for one in answer.choices] == texts(made, max_tokens=12)
    assert answer.choices[0].finish_reason == "length" and answer.object == "text_completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(IDS), 12)
    assert answer.usage.total_tokens == len(IDS) + 12


OPTIONS = [
    {"temperature": 0.9, "seed": 3, "n": 3},
    {"temperature": 0.9, "seed": 3, "top_p": 0.5},
    {"temperature": 0.0, "presence_penalty": -2, "frequency_penalty": -2},
    {"temperature": 0.0, "logit_bias": {str(IDS[0]): 100}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_fields_of_sampling_are_honoured(made, ask, options, is_stream):
    own = {**options, "logit_bias": {int(key): value for key, value in options.get("logit_bias", {}).items()}}
    expected = texts(made, [PROMPT, "x = "], max_tokens=24, **own)
    assert expected != texts(made, [PROMPT, "x = "], max_tokens=24)
    answer = ask([PROMPT, "x = "], max_tokens=24, stream=is_stream, **options)
    if not is_stream:
        assert [one.text for one in answer.choices] == expected
        return
    found, reasons = [""] * len(expected), [None] * len(expected)
    for chunk in answer:
        (choice,) = chunk.choices
        found[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert found == expected and reasons == ["length"] * len(expected)


def test_a_stop_string_ends_the_text(made, ask):
    (whole,) = texts(made, max_tokens=20)
    stop = whole[6:8]
    for value in (stop, [stop, "\0\0"]):
        choice = ask(temperature=0, max_tokens=20, stop=value).choices[0]
        assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_a_stream_ends_with_its_usage_if_asked(ask):
    chunks = list(ask(temperature=0, max_tokens=5, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_tokens_of_the_prompt_cache_are_in_the_usage(ask):
    prompt = [IDS[number % len(IDS)] for number in range(7, 107)]
    first, second = (ask(prompt, temperature=0, max_tokens=4) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 96


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_log_probabilities_are_the_engines(made, ask, is_stream):
    (record,) = made.generate([PROMPT], Sampling(max_tokens=6, logprobs=2))
    answer = ask(temperature=0, max_tokens=6, logprobs=2, stream=is_stream)
    tables = [one.choices[0].logprobs for one in (answer if is_stream else [answer])]
    tables = [one for one in tables if one is not None]
    values = [value for table in tables for value in table.token_logprobs]
    assert values == pytest.approx([one.logprob for one in record.logprobs], abs=1e-4)
    names = [name for table in tables for name in table.tokens]
    assert names == [name_of(token) for token in record.token_ids]
    assert all(len(top) == 2 for table in tables for top in table.top_logprobs)


def name_of(token):
    text = TOKENIZER.decode([token])
    return f"token_id:{token}" if not text or "\ufffd" in text else text


def test_echo_puts_the_prompt_before_and_scores_it(made, ask):
    (record,) = made.generate([PROMPT], Sampling(max_tokens=3, logprobs=0, prompt_logprobs=0))
    choice = ask(temperature=0, max_tokens=3, echo=True, logprobs=0).choices[0]
    assert choice.text == PROMPT + record.text
    scores = [*record.prompt_logprobs, *record.logprobs]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx([one.logprob for one in scores[1:]], abs=1e-4)
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(IDS) + 3


def test_echo_comes_first_in_a_stream(made, ask):
    expected = [PROMPT + text for text in texts(made, max_tokens=3, temperature=0.7, seed=1, n=2)]
    found = ["", ""]
    for chunk in ask(temperature=0.7, seed=1, n=2, max_tokens=3, echo=True, stream=True):
        found[chunk.choices[0].index] += chunk.choices[0].text
    assert found == expected


def test_no_tokens_at_all_score_the_prompt(ask):
    answer = ask(max_tokens=0, echo=True, logprobs=1)
    assert (answer.choices[0].text, answer.usage.completion_tokens) == (PROMPT, 0)
    assert len(answer.choices[0].logprobs.token_logprobs) == len(IDS)


REFUSED = [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"temperature": 0, "top_p": 2}, "top_p"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"n": 1000}, "n"),
    ({"n": 9}, "n"),
    ({"stop": [1]}, "stop"),
    ({"stop": 1}, "stop"),
    ({"seed": -1}, "seed"),
    ({"logprobs": 21}, "logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"echo": True, "stream": True, "logprobs": 1}, "echo"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": True}}, "stream_options.other"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"user": "x"}, "user"),
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [1, "x"]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": ["x"] * 129}, "prompt"),
    ({"prompt": [1] * 3000}, "prompt"),
    ({"model": None}, "model"),
    ({"invented": 1}, "invented"),
]


@pytest.mark.parametrize(("change", "name"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_field_that_cannot_be_honoured_is_named(address, change, name):
    with client(address) as one, pytest.raises(openai.BadRequestError) as caught:
        one.post("/completions", body={"model": NAME, "prompt": PROMPT, **change}, cast_to=object)
    assert caught.value.param == name and name.split(".")[-1] in caught.value.message
    assert caught.value.type == "invalid_request_error" and "; " in caught.value.body["message"]


BODIES = [
    "",
    "{",
    "[]",
    "1",
    '{"model": NaN}',
    '{"prompt": "\\ud800"}',
    "[" * 100_000,
    b"\xff",
    '{"a": ' + "9" * 5000 + "}",
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_what_is_no_json_object_is_refused(address, body):
    answer = httpx2.post(f"{address}/v1/completions", content=body)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"


def test_other_errors_have_their_own_types(made, address, ask):
    with client(address) as one, pytest.raises(openai.NotFoundError) as caught:
        one.completions.create(model="other", prompt=PROMPT)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert httpx2.get(f"{address}/v1/embeddings").json()["error"]["code"] == "not_found"
    assert httpx2.get(f"{address}/v1/completions").status_code == 405


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_that_is_too_long_is_refused(made, is_announced):
    body = b'{"model": "tiny", "prompt": "' + b"x" * 3000 + b'"}'
    with serving(made, Limits(body_bytes=2000)) as address:
        answer = httpx2.post(f"{address}/v1/completions", content=body if is_announced else iter([body]))
        assert answer.status_code == 413 and "2000 bytes" in answer.json()["error"]["message"]


def test_too_many_that_wait_get_429_with_retry_after(tmp_path):
    limits = Limits(max_waiting=1)
    with engine(tmp_path, max_running=1) as made, serving(made, limits) as address, client(address) as one:
        ask = {"model": NAME, "prompt": PROMPT, "temperature": 0}
        stream = one.completions.create(**ask, max_tokens=1500, stream=True)
        next(iter(stream))
        waiting = threading.Thread(target=lambda: one.completions.create(**ask, max_tokens=1))
        waiting.start()
        wait(lambda: httpx2.get(f"{address}/health").json()["num_waiting"] == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            one.completions.create(**ask, max_tokens=1)
        assert caught.value.response.headers["retry-after"] == "1"
        stream.close()
        waiting.join()


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_who_leaves_is_cancelled(made, address, is_stream):
    wait(lambda: made.stats().num_running == 0)
    before = made.stats().num_steps
    with client(address) as one:
        ask = {"model": NAME, "prompt": PROMPT, "temperature": 0, "max_tokens": 1900}
        if is_stream:
            stream = one.completions.create(**ask, stream=True)
            next(iter(stream))
            stream.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                one.completions.create(**ask, timeout=0.2)
    wait(lambda: made.stats().num_running == 0)
    assert 0 < made.stats().num_steps - before < 1900


def test_requests_on_their_way_finish_before_the_server_ends(made):
    answers = []
    with serving(made) as address:

        def ask():
            with client(address) as one:
                answers.append(one.completions.create(model=NAME, prompt=PROMPT, temperature=0, max_tokens=100))

        asking = threading.Thread(target=ask)
        asking.start()
        wait(lambda: made.stats().num_running == 1)
    asking.join()
    assert [one.usage.completion_tokens for one in answers] == [100]
