"""Training an accelerated model: dropout, gradient checkpointing, and a checkpoint that loads without hasten."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import hasten.models
from tests.models.tiny import ARCHITECTURES, distance, inputs, logits_and_gradients, real_positions

DROPOUT = {
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "bert": {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0},
    "roberta": {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.1},
    "bart": {"attention_dropout": 0.5, "dropout": 0.0},
    "phi": {"attention_dropout": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi3": {"attention_dropout": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_dropout_acts_in_training_and_only_there(architecture):
    _, fast = architecture.pair(**DROPOUT.get(architecture.name, {"attention_dropout": 0.5}))
    given = inputs(architecture, side="right")
    real = real_positions(architecture, given)
    quiet, _ = logits_and_gradients(fast, given, real)
    fast.train()
    one, gradients = logits_and_gradients(fast, given, real)
    other, _ = logits_and_gradients(fast, given, real)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert distance(one, other) > 1e-3 and distance(one, quiet) > 1e-3
    fast.eval()
    assert torch.equal(logits_and_gradients(fast, given, real)[0], quiet)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["hooks", "reentrant"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_gradient_checkpointing_changes_nothing(architecture, use_reentrant):
    no_dropout = dict.fromkeys(DROPOUT.get(architecture.name, {"attention_dropout": 0.0}), 0.0)
    no_dropout |= {"dropout": 0.0} if architecture.name == "bart" else {}
    _, fast = architecture.pair(**no_dropout)
    given = inputs(architecture, side="right")
    real = real_positions(architecture, given)
    expected, expected_gradients = logits_and_gradients(fast.train(), given, real, use_cache=False)
    new_name, old_name = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    enable = getattr(fast, new_name) if hasattr(fast, new_name) else getattr(fast, old_name)
    enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        fast.enable_input_require_grads()
    got, gradients = logits_and_gradients(fast, given, real, use_cache=False)
    assert distance(got, expected) < 1e-6
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


LOAD = """
import json, sys, torch, transformers
for path, name in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    getattr(transformers, name).from_pretrained(path, dtype=torch.float32)
print(json.dumps("hasten" in sys.modules))
"""


def test_saved_models_load_without_hasten(tmp_path):
    arguments = []
    for architecture in (one for one in ARCHITECTURES if one.name in ("llama", "t5", "gemma2")):
        folder = tmp_path / architecture.name
        architecture.pair()[1].save_pretrained(folder)
        for path in folder.glob("*.json"):
            assert "hasten" not in path.read_text()
        arguments += [str(folder), architecture.model]
    command = [sys.executable, "-c", LOAD, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) is False


def test_a_checkpoint_loads_with_hasten_by_name(tmp_path):
    llama = ARCHITECTURES[0]
    eager = llama.build()
    eager.save_pretrained(tmp_path)
    loaded = type(eager).from_pretrained(tmp_path, attn_implementation="hasten", dtype=torch.float32)
    assert loaded.config._attn_implementation == "hasten"
    given = inputs(llama, side="left")
    real = real_positions(llama, given)
    assert distance(loaded(**given).logits[real[..., 0]], eager(**given).logits[real[..., 0]]) < 4e-5
    assert hasten.models.accelerate(loaded) is loaded
