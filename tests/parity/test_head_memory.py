"""No [tokens, vocabulary] tensor exists at any moment of a training step."""

import dataclasses

import numpy as np
import pytest
import torch
from mcore_sft.config import SFTConfig
from sft_case import LAYOUTS, SGD, SHAPE, recipe
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mcore_core.model import head
from mcore_core.testing.cases import Case, Session
from mcore_core.testing.ranks import fork_ranks

VOCAB, TOKENS = 3000, 48
SMALL = dataclasses.replace(SHAPE, vocab_size=VOCAB, hidden_size=8, num_layers=2)


class Largest(TorchDispatchMode):
    """Keeps the largest number of elements of any tensor that an operation returned, by type."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.seen[leaf.dtype] = max(self.seen.get(leaf.dtype, 0), leaf.numel())
        return out


def whole_row(config):
    """The same loss, computed over the whole row: logits are recomputed in the backward pass."""
    found = recipe(config)
    found.token_local = False
    return found


def largest(layout, chunk_bytes, build=recipe, dtype="float32"):
    """Return what each rank saw in one step over two rows of TOKENS tokens, all trained."""
    rng = np.random.default_rng(0)
    length = TOKENS // 2 + 1  # the last token of a sequence predicts nothing
    units = [
        [
            {
                "input_ids": rng.integers(0, VOCAB, length),
                "weights": np.ones(length, np.float32),
                "length": length,
            }
            for _ in range(2)
        ]
        for _ in range(2)
    ]
    case = Case(
        architecture=SMALL,
        recipe=build,
        steps=[units],
        options={**SGD, "recompute_granularity": "none"},
        groups=(SFTConfig,),
        dtype=dtype,
    )

    def one_rank(_):
        head.CHUNK_BYTES = chunk_bytes
        session = Session(case, LAYOUTS[layout])
        with Largest() as mode:
            session.train(1)
        return {str(k): v for k, v in mode.seen.items()}

    return fork_ranks(one_rank, LAYOUTS[layout].world)


@pytest.mark.parametrize(
    ("layout", "build"),
    [("one", recipe), ("pp2", recipe), ("pp2", whole_row), ("tp2-sp", recipe)],
    ids=["one-token-local", "pp2-token-local", "pp2-whole-row", "tp2-sp-token-local"],
)
def test_logits_are_made_in_chunks(layout, build):
    ranks = largest(layout, 1, build)
    rows = VOCAB // LAYOUTS[layout].tp
    for seen in ranks:
        # the weight and the flat buffers of its gradients are larger than a chunk of 16 tokens
        assert seen["torch.float32"] < TOKENS * rows
    assert ranks[-1]["torch.float32"] >= 16 * rows


def test_the_measure_sees_logits_where_they_exist():
    """With room for all tokens in one chunk the same step does make them."""
    ranks = largest("one", 2**28, whole_row)
    assert ranks[0]["torch.float32"] >= TOKENS * VOCAB


def test_bfloat16_logits_become_float32_in_chunks_only():
    (seen,) = largest("one", 1, whole_row, dtype="bfloat16")
    assert seen["torch.float32"] < TOKENS * VOCAB
    assert seen["torch.bfloat16"] < TOKENS * VOCAB
