"""Structured output: the text follows its grammar, whatever the model wants to say, and bad grammars are named."""

from __future__ import annotations

import json
import re
import sys

import pytest

from hasten.engine import Failed, Sampling, generate
from hasten.engine.engine import Engine
from hasten.errors import ArgumentError, MissingExtraError
from tests.engine.test_engine import TOKENIZER, ids_of, speaker

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "maximum": 999, "minimum": 0},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
END = (TOKENIZER.eos_token_id,)


@pytest.fixture
def engine():
    with Engine(speaker(), TOKENIZER, num_pages=40, max_running=8) as made:
        yield made
        made.check_integrity()


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)], ids=["mapping", "text"])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_schema_is_followed(engine, schema, temperature):
    sampling = Sampling(max_tokens=100, json_schema=schema, temperature=temperature, seed=1, stop_ids=END)
    for record in engine.generate(["def add", "the quick brown fox"], sampling):
        assert record.finish_reason == "stop" and record.stopped_by == END[0]
        found = json.loads(record.text)
        assert set(found) == {"name", "age"} and 0 <= found["age"] <= 999 and len(found["name"]) <= 4


@pytest.mark.parametrize(
    ("options", "pattern"),
    [({"regex": r"(yes|no): [0-9]{3}"}, r"(yes|no): [0-9]{3}"), ({"grammar": 'start: "a" "b"+ "c"'}, "ab+c")],
    ids=["regex", "lark"],
)
def test_other_grammars_are_followed(engine, options, pattern):
    sampling = Sampling(max_tokens=60, temperature=1.0, seed=3, stop_ids=END, n=3, **options)
    records = engine.generate(["def add"], sampling)
    for record in records:
        assert record.finish_reason == "length" or re.fullmatch(pattern, record.text)
    assert any(record.finish_reason == "stop" for record in records)


def test_a_grammar_touches_no_other_request_and_survives_preemption():
    sampling = Sampling(max_tokens=40, regex="[a-z ]+", temperature=1.0, seed=3, stop_ids=END)
    plain = Sampling(max_tokens=40)
    with Engine(speaker(), TOKENIZER, num_pages=40, max_running=8) as made:
        expected = ids_of([*made.generate(["def add"] * 3, sampling), *made.generate(["fox"], plain)])
    with Engine(speaker(), TOKENIZER, num_pages=5, max_running=8) as made:
        handles = [made.submit("def add", sampling) for _ in range(3)] + [made.submit("fox", plain)]
        assert ids_of([handle.result()[0] for handle in handles]) == expected
        assert made.stats().num_preemptions > 0


BAD = {
    "schema": ({"json_schema": {"type": "nonsense"}}, "json_schema: expected what llguidance can follow"),
    "json": ({"json_schema": "{"}, "json_schema: expected what llguidance can follow"),
    "regex": ({"regex": "(["}, "regex: expected what llguidance can follow"),
    "lark": ({"grammar": "start: missing"}, "grammar: expected what llguidance can follow"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_grammar_that_is_none_is_named(engine, case):
    options, message = BAD[case]
    (record,) = engine.generate(["def add"], Sampling(stop_ids=END, **options))
    assert isinstance(record, Failed) and str(record.error).startswith(message)


def test_what_else_it_needs_is_named(engine, monkeypatch):
    with pytest.raises(ArgumentError, match="regex: expected a token with which the text can end"):
        engine.submit("def add", Sampling(regex="a"))
    with pytest.raises(ArgumentError, match="regex: expected nothing beside json_schema"):
        Sampling(regex="a", json_schema="{}")
    with pytest.raises(ArgumentError, match="regex: expected None for one request at a time"):
        generate(speaker(), TOKENIZER, "def add", Sampling(regex="a"))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hasten\[structured\]'"):
        engine.submit("def add", Sampling(regex="a", stop_ids=END))
