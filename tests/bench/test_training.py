"""The training suite on a tiny model: complete records, FLOPs by the book, and a wrong attention found out."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from hasten.bench import ceilings, training
from hasten.bench.timing import Plan
from hasten.bench.training import Options, Variant
from hasten.errors import ArgumentError
from hasten.ops.cost import Rates

CPU = torch.device("cpu")
RATES = Rates(1e11, 1e10)
TINY = Variant("tiny", 2, 24, "sdpa")


def options(**changes) -> Options:
    usual = {"models": ["tiny"], "shapes": [(2, 24)], "attentions": ["eager", "sdpa"], "steps": 2}
    return Options(**(usual | {"dtype": torch.float32, "device": CPU} | changes))


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "_MATRIX", {"cpu": 64})
    monkeypatch.setattr(ceilings, "_COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(ceilings, "_PLAN", {"cpu": Plan(budget_ms=1, rounds=1, rest_ms=0)})


def test_a_run_gives_complete_records():
    made, told = [], []
    training.run(options(), made.extend, told.append)
    assert [(record["kind"], record["implementation"], record["status"]) for record in made] == [
        ("training", "eager", "ok"),
        ("training", "sdpa", "ok"),
    ]
    for record in made:
        assert record["tokens_per_s"] == pytest.approx(2 * 24 / (record["median_ms"] / 1e3), rel=1e-3)
        assert record["n"] == 2
        assert record["mfu"] is None  # no datasheet for a CPU
        assert {"device", "transformers", "commit", "command", "loss", "first_step_s"} <= set(record)
    assert made[1]["grad_difference"] < 1e-4
    assert len(told) == 2


def test_our_attention_trains_the_same_model(monkeypatch):
    monkeypatch.setenv("HASTEN_IMPLEMENTATION", "reference")
    made = []
    training.run(options(attentions=["eager", "hasten"]), made.extend, lambda line: None)
    assert [record["status"] for record in made] == ["ok", "ok"]
    assert made[1]["grad_difference"] < 1e-4
    assert made[1]["loss"] == pytest.approx(made[0]["loss"], rel=1e-4)


def test_the_loss_without_whole_logits_is_the_same_model(monkeypatch):
    monkeypatch.setenv("HASTEN_IMPLEMENTATION", "reference")
    made = []
    training.run(options(attentions=["eager", "hasten-train"]), made.extend, lambda line: None)
    assert [record["status"] for record in made] == ["ok", "ok"]
    assert made[1]["grad_difference"] < 1e-4
    assert made[1]["loss"] == pytest.approx(made[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("attention", training.ATTENTIONS)
def test_an_encoder_has_a_loss_of_its_own(monkeypatch, attention):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = transformers.BertConfig(vocab_size=50, max_position_embeddings=64, **small)
    monkeypatch.setitem(training.MODELS, "tiny", lambda length: bert)
    made = []
    training.run(options(attentions=[attention]), made.extend, lambda line: None)
    assert made[0]["status"] == ("failed" if attention == "hasten-train" else "ok")


def test_every_model_has_shapes_and_the_size_of_its_name():
    assert training.SHAPES.keys() == training.MODELS.keys()
    sizes = {"gpt2-124m": 124e6, "gpt2-355m": 355e6, "gpt-1.3b": 1.31e9, "llama-1.4b": 1.42e9, "bert-large": 335e6}
    for name, count in sizes.items():
        model = training.build(Variant(name, 1, 64, "sdpa"), torch.device("meta"))
        assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(count, rel=0.01)


def test_variants_say_how_they_are_compiled():
    names = [Variant("tiny", 1, 8, "hasten", mode).name for mode in training.COMPILES]
    assert names == ["hasten", "hasten+compile", "hasten+reduce-overhead", "hasten+max-autotune"]
    made = []
    training.run(options(shapes=(), attentions=["sdpa"], steps=1), made.extend, lambda line: None)
    assert (made[0]["batch"], made[0]["seqlen"]) == training.SHAPES["tiny"][0]


def test_a_lost_causal_mask_is_wrong_and_has_no_time(monkeypatch):
    truth = training._measure(TINY, options()).attention_grad
    own = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda q, k, v, **terms: own(q, k, v))
    record, grad = training.measure_variant(TINY, options(), RATES, truth)
    assert record["status"] == "wrong"
    assert record["grad_difference"] > 3 * training._LARGEST_DIFFERENCE
    assert "tokens_per_s" not in record
    assert grad is None


@pytest.mark.parametrize(
    "error, status", [(torch.OutOfMemoryError("no"), "out of memory"), (ValueError("two\nlines"), "failed")]
)
def test_a_variant_that_breaks_is_a_record(monkeypatch, error, status):
    def fail(variant, device):
        raise error

    monkeypatch.setattr(training, "build", fail)
    record, grad = training.measure_variant(TINY, options(), RATES, None)
    assert record["status"] == status
    assert grad is None
    assert record.get("reason", "two lines") == "two lines"


def test_flops_of_gpt2_are_the_books():
    """Six a weight and token and 6 L d T of attention (12 L d T halved for causal), within a part in a thousand."""
    with torch.device("meta"):
        variant = Variant("gpt2-124m", 8, 1024, "sdpa")
        model = training.build(variant, torch.device("meta"))
    weights = 124_439_808 - 1024 * 768
    book = (6 * weights + 6 * 12 * 768 * 1024) * 8 * 1024
    assert training.step_flops(model, 8, 1024).exact == pytest.approx(book, rel=1e-3)


def test_flops_of_a_llama_leave_out_the_input_table():
    model = training.build(Variant("llama-1.1b", 1, 64, "sdpa"), torch.device("meta"))
    weights = sum(weight.numel() for weight in model.parameters()) - 32768 * 2048
    attention = 6 * 16 * 2048 * 64 * 64 * (65 / 64)
    assert training.step_flops(model, 1, 64).exact == pytest.approx(6 * weights * 64 + attention, rel=1e-9)


def test_bad_options_are_refused():
    with pytest.raises(ArgumentError, match=r"model: expected some of gpt2-124m, gpt2-355m, .*, tiny, got 'gpt3'"):
        options(models=["gpt3"])
    with pytest.raises(
        ArgumentError, match="attention: expected some of eager, sdpa, hasten, hasten-train, got 'fast'"
    ):
        options(attentions=["fast"])
    assert training.parse_shape("8x1024") == (8, 1024)
    for text in ("8", "8x", "x8", "8x0", "8x1024x2", "ax4"):
        with pytest.raises(ArgumentError, match="shape: expected BATCHxLENGTH"):
            training.parse_shape(text)
