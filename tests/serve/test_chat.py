"""`/v1/chat/completions` through the official client: the template's own tokens, every field, errors by their names."""

from __future__ import annotations

import copy
import json

import openai
import pytest

from hasten.engine import Sampling
from tests.engine.tiny_checkpoints import TOKENIZER
from tests.serve.serving import NAME, client, engine, serving

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}"
    "{{ raise_exception('a user first') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "developer", "content": "short"}, {"role": "user", "content": [{"type": "text", "text": "a + b"}]}]
TEXT = "<system>short\n<user>a + b\n<assistant>"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with engine(tmp_path_factory.mktemp("checkpoint")) as one:
        one.tokenizer = copy.deepcopy(TOKENIZER)
        one.tokenizer.chat_template = TEMPLATE
        one.model.generation_config.eos_token_id = 0
        yield one


@pytest.fixture(scope="module")
def address(made):
    with serving(made) as one:
        yield one


@pytest.fixture(scope="module")
def ask(address):
    with client(address) as one:
        yield lambda messages=MESSAGES, **options: one.chat.completions.create(model=NAME, messages=messages, **options)


def records(made, **options):
    ids = TOKENIZER(TEXT, add_special_tokens=False)["input_ids"]
    return made.generate([ids], Sampling(**options))


OPTIONS = [{"temperature": 0.0}, {"temperature": 0.8, "seed": 2, "n": 2, "top_p": 0.9}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_the_text_is_the_engines_own(made, ask, options, is_stream):
    expected = records(made, max_tokens=12, logprobs=1, **options)
    answer = ask(max_completion_tokens=12, logprobs=True, top_logprobs=1, stream=is_stream, **options)
    texts, values, reasons = [""] * len(expected), [[] for _ in expected], [""] * len(expected)
    roles = set()
    for part in answer if is_stream else [answer]:
        for choice in part.choices:
            said = choice.delta if is_stream else choice.message
            texts[choice.index] += said.content or ""
            roles |= {said.role}
            reasons[choice.index] = choice.finish_reason
            if choice.logprobs is not None:
                values[choice.index] += [one.logprob for one in choice.logprobs.content]
                assert all(len(one.top_logprobs) == 1 for one in choice.logprobs.content)
    assert texts == [one.text for one in expected] and "assistant" in roles
    assert reasons == [one.finish_reason for one in expected]
    for got, record in zip(values, expected, strict=True):
        assert got == pytest.approx([one.logprob for one in record.logprobs], abs=1e-4)


def test_usage_whole_and_in_a_stream(ask):
    whole = ask(temperature=0, max_tokens=5).usage
    *rest, last = ask(temperature=0, max_tokens=5, stream=True, stream_options={"include_usage": True})
    assert (whole.prompt_tokens, whole.completion_tokens) == (last.usage.prompt_tokens, last.usage.completion_tokens)
    assert last.choices == [] and all(chunk.usage is None for chunk in rest)


def test_a_schema_is_followed(ask):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    shape = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    for seed in range(3):
        choice = ask(response_format=shape, seed=seed, max_tokens=40).choices[0]
        assert set(json.loads(choice.message.content)) == {"ok"} and choice.finish_reason == "stop"


REFUSED = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ({"messages": ["x"]}, "messages[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}, "response_format"),
    ({"tools": []}, "tools"),
    ({"n": 0}, "n"),
]


@pytest.mark.parametrize(("change", "name"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_field_that_cannot_be_honoured_is_named(address, change, name):
    with client(address) as one, pytest.raises(openai.BadRequestError) as caught:
        one.post("/chat/completions", body={"model": NAME, "messages": MESSAGES, **change}, cast_to=object)
    assert caught.value.param == name


def test_a_model_without_a_template_says_so(tmp_path):
    raised = pytest.raises(openai.BadRequestError, match="chat template")
    with engine(tmp_path) as made, serving(made) as address, client(address) as one, raised as caught:
        one.chat.completions.create(model=NAME, messages=MESSAGES)
    assert (caught.value.param, caught.value.code) == ("messages", "no_chat_template")
