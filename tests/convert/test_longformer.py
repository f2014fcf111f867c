"""A converted encoder is the encoder where theory says so, and differs where the window begins to hide keys."""

from __future__ import annotations

import pytest
import torch

import hasten
from hasten.convert import longformer
from hasten.errors import ArgumentError
from tests.convert.encoders import build, ids

WINDOW, LENGTH = 16, 150
TOLERANCE = 1e-5
SAME_HEADS = [
    ("Bert", "ForMaskedLM"),
    ("Bert", "ForSequenceClassification"),
    ("Bert", "ForQuestionAnswering"),
    ("Roberta", "ForMaskedLM"),
    ("Roberta", "ForSequenceClassification"),
    ("XLMRoberta", "ForMaskedLM"),
    ("Camembert", "ForTokenClassification"),
    ("DistilBert", "ForMaskedLM"),
    ("DistilBert", "ForQuestionAnswering"),
    ("Electra", "ForMaskedLM"),
    ("Electra", "ForTokenClassification"),
]


def distance(one, other):
    return ((one - other).abs().max() / one.abs().max()).item()


@pytest.mark.parametrize(("family", "task"), SAME_HEADS, ids=lambda part: part)
@torch.no_grad()
def test_outputs_are_equal_where_the_window_reaches_all(family, task):
    model = build(family, task)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted, report = longformer.convert(model, max_length=LENGTH, window=WINDOW)
    assert type(converted).__name__ == f"Longformer{task}" == report.target
    for seqlen, is_global in ((WINDOW // 2 + 1, 0), (5, 0), (41, 1)):
        given = {"input_ids": ids(2, seqlen)}
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][0, seqlen - 2 :] = 0
        given["input_ids"][0, seqlen - 2 :] = converted.config.pad_token_id
        expected = model(**given)
        got = converted(**given, global_attention_mask=torch.full_like(given["input_ids"], is_global))
        real = (
            given["attention_mask"].bool() if expected[0].ndim > 1 and expected[0].shape[1] == seqlen else slice(None)
        )
        for one, other in zip(expected.to_tuple(), got.to_tuple(), strict=True):
            assert distance(one[real], other[real]) < TOLERANCE
    longer = {"input_ids": ids(2, WINDOW // 2 + 8)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    if task == "ForMaskedLM":
        plain = converted(**longer, global_attention_mask=torch.zeros_like(longer["input_ids"]))
        assert distance(model(**longer).logits, plain.logits) > 1e-4
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "Electra"])
def test_every_tensor_is_reported_and_checked(family):
    model = build(family)
    converted, report = longformer.convert(model, max_length=LENGTH, window=[8, WINDOW])
    report.checks += longformer.self_checks(model, converted)
    report.expect_passed()
    assert len(report.checks) == 2
    reported = {entry.name: entry for entry in report.entries if entry.origin != "dropped"}
    assert set(reported) == set(converted.state_dict())
    assert {name: entry.shape for name, entry in reported.items()} == {
        name: tuple(tensor.shape) for name, tensor in converted.state_dict().items()
    }
    assert converted.config.attention_window == [8, WINDOW]
    assert hasten.convert.longformer is longformer


def test_positions_are_repeated_from_the_row_that_tokens_use():
    for family, first, old in (("Bert", 1, 64), ("Roberta", 2, 62)):
        model = build(family)
        table = longformer.to_longformer(model, max_length=LENGTH, window=WINDOW).embeddings.position_embeddings.weight
        source = model.embeddings.position_embeddings.weight[first if family == "Roberta" else 0 :]
        assert table.shape[0] == LENGTH + first
        for row in (0, 1, old - 1, old, 2 * old, LENGTH - 1):
            assert torch.equal(table[first + row], source[row % old])


@torch.no_grad()
def test_token_types_are_kept_and_a_long_text_passes():
    model = build("Bert", type_vocab_size=2)
    converted = longformer.to_longformer(model, max_length=LENGTH, window=WINDOW)
    given = {"input_ids": ids(2, 9), "token_type_ids": torch.arange(9).expand(2, 9) // 5}
    assert distance(model(**given)[0], converted(**given)[0]) < TOLERANCE
    fast = hasten.accelerate(longformer.to_longformer(model, max_length=LENGTH, window=WINDOW))
    assert distance(converted(ids(2, LENGTH))[0], fast(ids(2, LENGTH))[0]) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "task", "dropped"),
    [
        ("Bert", "ForPreTraining", "cls.seq_relationship.weight"),
        ("Electra", "ForPreTraining", None),
        ("DistilBert", "ForSequenceClassification", "pre_classifier.weight"),
    ],
)
def test_heads_without_an_equal_are_named(family, task, dropped):
    model = build(family, task)
    converted, report = longformer.convert(model, max_length=LENGTH, window=WINDOW)
    assert report.count("dropped") > 0
    assert dropped is None or dropped in {entry.name for entry in report.entries if entry.origin == "dropped"}
    if type(converted).__name__ == "LongformerModel":
        assert f"the head of {family}{task}" in report.remarks[0]
    assert longformer.self_checks(model, converted)[0].has_passed


def test_half_precision_stays():
    converted = longformer.to_longformer(build("Roberta", "ForMaskedLM").bfloat16(), max_length=LENGTH, window=WINDOW)
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("Electra", {"embedding_size": 16}, "MODEL: .* embeddings of 16 that are projected to 32"),
        ("GPT2", {}, "MODEL: expected one of bert, .*, got gpt2"),
        ("Bart", {}, "got bart; bart converts to LED"),
    ],
)
def test_what_cannot_be_expressed_is_refused(family, options, words):
    if family == "GPT2":
        options = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 67}
    with pytest.raises(ArgumentError, match=words):
        longformer.to_longformer(build(family, **options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 7}, "attention_window: expected an even number, got 7"),
        ({"window": [8, 8, 8]}, "window: expected one number, or one for each of 2 layers"),
        ({"max_length": 0}, "max_length: expected a number of tokens >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(options, words):
    with pytest.raises(ArgumentError, match=words):
        longformer.to_longformer(build("Bert"), **{"max_length": 100, "window": 8, **options})
