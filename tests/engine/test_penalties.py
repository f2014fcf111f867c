"""What is taken from and added to logits, by hand."""

from __future__ import annotations

import pytest
import torch

from hasten.engine.penalties import Bias, Penalties


def test_a_bias_is_added_to_its_tokens():
    scores = torch.arange(10.0).view(2, 5)
    biased = Bias({3: -2.5, 0: 1.0}, torch.device("cpu"))(None, scores)
    assert (biased - scores).tolist() == [[1.0, 0, 0, -2.5, 0]] * 2 and scores[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0.0), (0.0, 0.25), (-1.0, 2.0)])
def test_penalties_count_the_new_text_only(presence, frequency):
    ids = torch.tensor([[0, 1, 2, 2, 4], [0, 1, 1, 1, 1]])
    scores = Penalties(2, presence, frequency)(ids, torch.zeros(2, 5))
    counts = torch.tensor([[0, 0, 2, 0, 1], [0, 3, 0, 0, 0]])
    assert torch.equal(scores, -presence * (counts > 0) - frequency * counts)
    assert not Penalties(5, presence, frequency)(ids, torch.zeros(2, 5)).any()
