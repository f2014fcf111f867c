"""What `make_mask` returns sees the same cells as transformers' own boolean mask, for thousands of requests."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from transformers import LlamaConfig
from transformers import masking_utils as made

from hasten.masks import And, Causal, Dense, Documents, Full, Padding, Window
from hasten.models.masking import ModelMask, make_mask

FUNCTIONS = {
    "causal": made.causal_mask_function,
    "full": made.bidirectional_mask_function,
    "sliding": made.sliding_window_causal_mask_function(4),
    "sliding_both": made.sliding_window_bidirectional_mask_function(3),
    "chunked": made.chunked_causal_mask_function(3, torch.tensor([0, 2])),
    "or": made.or_masks(made.causal_mask_function, made.blockwise_overlay(torch.tensor([[0, 0, -1, 1, 1] * 6] * 2))),
}
# (q_length, kv_length, q_offset, kv_offset): no cache, growing cache, sliding cache, static cache not yet full
PLACES = [
    (7, 7, 0, 0),
    (1, 7, 6, 0),
    (3, 7, 4, 0),
    (1, 4, 9, 6),
    (3, 6, 9, 6),
    (1, 12, 6, 0),
    (5, 12, 0, 0),
    (3, 12, 4, 0),
    (2, 9, 0, 0),
]
PADDINGS = {
    "none": None,
    "ones": torch.ones(2, 12, dtype=torch.bool),
    "left": torch.tensor([[1] * 12, [0] * 2 + [1] * 10]).bool(),
    "right": torch.tensor([[1] * 5 + [0] * 7, [1] * 12]).bool(),
    "holes": torch.tensor([[1, 0, 1, 1] * 3, [1] * 12]).bool(),
}


def keep(result, q_length, kv_length):
    """bool (2, 1, q_length, kv_length): what a layer will see, given what the mask maker returned."""
    if isinstance(result, torch.Tensor):
        return result.expand(2, 1, q_length, kv_length)
    num_keys = kv_length if result.num_keys is None else result.num_keys
    seen = result.mask.keep(q_length, num_keys, batch=2)
    return torch.nn.functional.pad(seen, (0, kv_length - num_keys))


@pytest.mark.parametrize("offset_is_tensor", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_cells_are_those_of_transformers(name, offset_is_tensor):
    for (q_length, kv_length, q_offset, kv_offset), (side, real) in itertools.product(PLACES, PADDINGS.items()):
        request = {"batch_size": 2, "q_length": q_length, "kv_length": kv_length, "kv_offset": kv_offset}
        request |= {
            "mask_function": FUNCTIONS[name],
            "q_offset": torch.tensor(q_offset) if offset_is_tensor else q_offset,
        }
        end = max(q_offset + q_length, kv_length + kv_offset if name in ("full", "sliding_both") else 0)
        request["attention_mask"] = None if real is None else real[:, :end]
        expected = made.sdpa_mask(**request, allow_is_causal_skip=False)
        got = keep(make_mask(**request), q_length, kv_length)
        assert torch.equal(got, expected.expand_as(got)), (request, side)


def request(**changes):
    return {"batch_size": 2, "q_length": 6, "kv_length": 6, **changes}


def test_known_masks_are_named_not_spelled_out():
    assert make_mask(**request()).mask == Causal()
    assert make_mask(**request(mask_function=FUNCTIONS["full"])).mask == Full()
    assert make_mask(**request(mask_function=FUNCTIONS["sliding"])).mask == Window(3, 0)
    assert make_mask(**request(mask_function=FUNCTIONS["sliding_both"])).mask == Window(3, 3)
    assert make_mask(**request(attention_mask=torch.ones(2, 6).bool())).mask == Causal()
    ids = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    packed = made.and_masks(made.causal_mask_function, made.packed_sequence_mask_function(ids))
    expected = And.of(Causal(), Documents(torch.tensor([[0, 3, 6], [0, 1, 6]], dtype=torch.int32)))
    assert make_mask(**request(mask_function=packed)).mask == expected


@pytest.mark.parametrize(
    ("real", "expected"),
    [
        ([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], Padding([4, 6])),
        ([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], Padding([4, 6], "left")),
        ([[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], Padding([0, 6])),
        ([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], None),
        ([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]], None),
    ],
    ids=["right", "left", "empty row", "both sides", "hole"],
)
def test_padding_is_named_where_it_is_plain_and_linear_where_not(real, expected):
    mask = make_mask(**request(mask_function=FUNCTIONS["full"], attention_mask=torch.tensor(real).bool())).mask
    assert mask == expected if expected is not None else (isinstance(mask, Dense) and mask.matrix.numel() == 12)


def test_a_static_cache_is_cut_for_a_prompt_and_counted_on_the_device_for_a_step():
    prompt = make_mask(**request(kv_length=16, q_offset=torch.tensor(4)))
    assert (prompt.mask, prompt.num_keys) == (Causal(), 10)
    step = make_mask(**request(q_length=1, kv_length=16, q_offset=torch.tensor(9)))
    assert (step.mask, step.num_keys) == (Padding([10, 10]), None)


@pytest.mark.parametrize(
    "maker", ["create_causal_mask", "create_sliding_window_causal_mask", "create_bidirectional_mask"]
)
@pytest.mark.parametrize("joined", ["or_mask_function", "and_mask_function"])
def test_a_mask_function_of_the_user_is_evaluated_cell_by_cell(maker, joined):
    image = torch.tensor([0, 1, 1, 0, 0, 2, 2])
    own = {joined: lambda b, h, q, k: image[q] == image[k]}
    masks = {}
    for name in ("hasten", "sdpa"):
        config = LlamaConfig(attn_implementation=name, sliding_window=3)
        given = {"config": config, "inputs_embeds": torch.zeros(2, 7, 8), "attention_mask": PADDINGS["left"][:, :7]}
        masks[name] = getattr(made, maker)(**given, past_key_values=None, **own)
    assert torch.equal(masks["hasten"], masks["sdpa"])


def test_a_mask_made_before_is_passed_on():
    mask = make_mask(**request())
    assert make_mask(**request(attention_mask=mask)) is mask
    assert mask.contiguous() is mask and mask.to("cpu") is mask and mask.ndim == 4


def test_a_mask_follows_its_layer_to_another_device():
    mask = ModelMask(Causal() & Padding([2, 3], "left"), 4)
    moved = mask.to("meta", non_blocking=True)
    assert moved.num_keys == 4 and repr(moved.mask) == repr(mask.mask)
    assert moved.mask.masks[1].lengths.device.type == "meta"
    assert mask.to(torch.device("cpu")) is mask


def test_a_layer_that_takes_it_for_a_tensor_is_told():
    mask = ModelMask(Causal())
    with pytest.raises(AttributeError, match=r"has no 'dtype'.*AttentionInterface"):
        _ = mask.dtype
    assert not hasattr(mask, "shape")
    with pytest.raises(TypeError):
        _ = mask + 1.0
    assert copy.deepcopy(mask).mask == Causal() and pickle.loads(pickle.dumps(mask)).mask == Causal()
