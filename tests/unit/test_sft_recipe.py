"""The sft recipe: units, micro-batches and the loss, against numbers worked out by hand."""

import pickle
from typing import Any

import pytest
import torch
from data_tools import chat, make_config, make_template
from mcore_sft.recipe import SFTRecipe

from mcore_core.protocols import HeadOut

REDUCE: Any = None  # cross-entropy needs no communication


def recipe(per_token=None, **options):
    return SFTRecipe(make_config(calculate_per_token_loss=per_token), make_template(**options))


def unit(ids, weights):
    import numpy as np

    return {
        "input_ids": np.array(ids, np.int32),
        "weights": np.array(weights, np.float32),
        "length": len(ids),
    }


UNITS = [unit([1, 2, 3], [0, 1, 1]), unit([4, 5, 6, 7], [0, 0, 1, 0]), unit([8], [0])]
LOGPS = torch.tensor([-1.0, -2.0, -99.0, -99.0, -4.0, -99.0, -99.0, -99.0])


def test_a_unit_has_ids_weights_and_length():
    got = recipe(system="be brief").encode(chat("hi", "yo"))
    assert got["length"] == len(got["input_ids"]) == len(got["weights"])
    text = make_template().describe(got)
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi")
    assert text.endswith("«yo<|im_end|>»\n")


@pytest.mark.parametrize("per_token", [None, True])
def test_per_token_every_trained_token_counts_alike(per_token):
    one = recipe(per_token)
    batch = one.collate(UNITS)
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.weights_T.tolist() == [1, 1, 0, 0, 1, 0, 0, 0]
    assert batch.count_T.tolist() == [1, 1, 0, 0, 1, 0, 0, 0]
    assert batch.lengths == (3, 4, 1)
    out = one.loss(HeadOut(logps_T=LOGPS), batch, REDUCE)
    assert (out.total.item(), out.count.item()) == (7.0, 3.0)


def test_per_sequence_every_sample_counts_alike():
    one = recipe(False)
    batch = one.collate(UNITS)
    assert batch.weights_T.tolist() == [0.5, 0.5, 0, 0, 1, 0, 0, 0]
    assert batch.count_T.tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
    out = one.loss(HeadOut(logps_T=LOGPS), batch, REDUCE)
    # means of (1, 2) and of (4): 1.5 + 4, over two sequences that train
    assert (out.total.item(), out.count.item()) == (5.5, 2.0)


@pytest.mark.parametrize("per_token", [True, False])
def test_parts_of_a_row_add_up_to_the_whole(per_token):
    one = recipe(per_token)
    whole = one.collate(UNITS)
    expected = one.loss(HeadOut(logps_T=LOGPS), whole, REDUCE)
    total = count = 0.0
    for part in (slice(0, 2), slice(2, 5), slice(5, 8)):
        fields = {k: getattr(whole, k)[part] for k in ("tokens_T", "targets_T", "weights_T")}
        batch = type(whole)(**fields, count_T=whole.count_T[part], lengths=(1,))
        got = one.loss(HeadOut(logps_T=LOGPS[part]), batch, REDUCE)
        total, count = total + got.total.item(), count + got.count.item()
    assert (total, count) == (expected.total.item(), expected.count.item())


def test_masked_positions_give_no_gradient_even_where_they_are_infinite():
    one = recipe()
    logps_T = LOGPS.clone()
    logps_T[2] = float("-inf")
    logps_T.requires_grad_()
    out = one.loss(HeadOut(logps_T=logps_T), one.collate(UNITS), REDUCE)
    out.total.backward()
    assert out.total.item() == 7.0
    assert logps_T.grad.tolist() == [-1, -1, 0, 0, -1, 0, 0, 0]


def test_a_fully_masked_micro_batch_counts_nothing():
    for per_token in (True, False):
        one = recipe(per_token)
        batch = one.collate([unit([1, 2], [0, 0])])
        out = one.loss(HeadOut(logps_T=torch.tensor([-1.0, -1.0])), batch, REDUCE)
        assert (out.total.item(), out.count.item()) == (0.0, 0.0)


def test_the_recipe_can_be_sent_to_worker_processes():
    one = recipe()
    copy = pickle.loads(pickle.dumps(one))
    assert copy.encode(chat("hi", "yo"))["length"] == one.encode(chat("hi", "yo"))["length"]
    assert one.state_dict() == {} and one.frozen == {} and one.token_local


def test_one_optimizer_step_a_global_batch():
    assert list(recipe().prepare([1, 2], None)) == [[1, 2]]
