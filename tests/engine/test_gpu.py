"""Generation on a GPU: the tokens of transformers by every way a runner has, and the command on the built-in model."""

from __future__ import annotations

import pytest
import torch

from hasten.cli import app
from hasten.engine.runner import Runner
from hasten.models import accelerate
from tests.engine.test_runner import NEW, PROMPT, WAYS, build, greedy
from tests.models.tiny import GENERATORS, tokens

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", GENERATORS, ids=str)
def test_tokens_are_those_of_transformers(architecture, way):
    model, prompt = build(architecture).cuda(), tokens(1, PROMPT)[0].tolist()
    ids = torch.tensor([prompt], device="cuda")
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    runner = Runner(accelerate(model), **WAYS[way])
    assert greedy(runner, prompt) == out[0, -NEW:].tolist()
    assert runner.path.startswith({"plain": "the model's own", "no_cache": "no KV cache"}.get(way, "recorded step"))


def test_the_command_continues_a_function(capsys):
    with pytest.raises(SystemExit) as ended:
        app.main(["generate", "--prompt", "def is_even(n):", "--max-tokens", "24", "--temperature", "0"])
    assert not ended.value.code
    out, err = capsys.readouterr()
    assert "even" in out and "cuda" in err
