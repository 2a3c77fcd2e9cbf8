"""Sampling: filters as transformers has them, and randomness that no batch changes."""

import numpy as np
import pytest
import torch
from mcore_rlhf.rollout.native.sample import (
    BLOCK,
    Choice,
    filtered,
    inverse,
    sample,
    stream_key,
    uniforms,
)
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mcore_core.protocols import Sampling

CPU = torch.device("cpu")
VOCAB = 37


def choice_of(*settings):
    return Choice.of(settings, VOCAB, CPU)


def reference(sampling, ids, logits):
    """Return the probabilities that transformers samples from."""
    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    return steps(ids[None], logits[None])[0].softmax(-1)


SETTINGS = [
    Sampling(max_tokens=1, temperature=0.7),
    Sampling(max_tokens=1, temperature=1.3, top_k=5),
    Sampling(max_tokens=1, temperature=0.9, top_p=0.6),
    Sampling(max_tokens=1, top_k=9, top_p=0.8),
    Sampling(max_tokens=1, temperature=1.1, top_k=9, top_p=0.8, repetition_penalty=1.7),
    Sampling(max_tokens=1, top_k=-1, repetition_penalty=0.6),
    Sampling(max_tokens=1, top_k=1000),
    Sampling(max_tokens=1, temperature=0.2, top_p=1e-6),
]


@pytest.mark.parametrize("mixed", [False, True])
def test_the_distribution_is_that_of_transformers(mixed):
    """Each row is drawn on a grid of random numbers: the shares are the probabilities."""
    grid = 4000
    generator = torch.Generator().manual_seed(0)
    numbers = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    for sampling in SETTINGS:
        logits = torch.randn(VOCAB, generator=generator) * 2
        ids = torch.randint(0, VOCAB, (6,), generator=generator)
        seen = torch.zeros(VOCAB, dtype=torch.bool)
        seen[ids] = True
        rows = [sampling] * grid
        if mixed:  # other rows have other settings
            rows = [s for pair in zip(rows, SETTINGS * grid, strict=False) for s in pair]
        repeated = numbers.repeat_interleave(2 if mixed else 1)
        tokens, logps = sample(
            logits.expand(len(rows), -1), repeated, choice_of(*rows), seen.expand(len(rows), -1)
        )
        tokens, logps = (x[:: 2 if mixed else 1] for x in (tokens, logps))
        share = torch.bincount(tokens, minlength=VOCAB) / grid
        expected = reference(sampling, ids, logits)
        assert (share - expected).abs().max() < 2 / grid
        assert set(tokens.tolist()) <= set(expected.nonzero().flatten().tolist())
        plain = (logits / sampling.temperature).log_softmax(-1)
        assert torch.equal(logps, plain[tokens]), "filters do not touch log-probabilities"


def test_one_setting_serves_all_rows():
    logits = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(1))
    number = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for sampling in SETTINGS:
        seen = logits > 1
        one = sample(logits, number, choice_of(sampling), seen)
        each = sample(logits, number, choice_of(*[sampling] * 50), seen)
        assert torch.equal(one[0], each[0])
        assert torch.equal(one[1], each[1])


def test_temperature_zero_takes_the_best():
    logits = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(3))
    number = torch.rand(20, dtype=torch.float64)
    greedy = Sampling(max_tokens=1, temperature=0, top_k=4)
    tokens, logps = sample(logits, number, choice_of(greedy))
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.equal(logps, logits.log_softmax(-1).amax(-1))
    mixed, _ = sample(logits, number, choice_of(*[greedy, Sampling(max_tokens=1)] * 10))
    assert torch.equal(mixed[::2], tokens[::2])
    assert not torch.equal(mixed[1::2], tokens[1::2])


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.full((3, VOCAB), float("-inf"))
    logits[:, [0, 5, VOCAB - 1]] = torch.tensor([1.0, 2.0, float("-inf")])
    number = torch.tensor([0.0, 0.5, 1 - 2.0**-32], dtype=torch.float64)
    tokens, _ = sample(logits, number, choice_of(Sampling(max_tokens=1)))
    assert tokens.tolist() == [0, 5, 5]


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(50, 0.9), (50, 1.0), (0, 0.9), (1500, 0.7), (3, 0.01), (50, 0.999)]
)
def test_a_large_vocabulary_is_filtered_as_transformers_does(top_k, top_p):
    logits = torch.randn(20, 3000, generator=torch.Generator().manual_seed(top_k)) * 4
    sampling = Sampling(max_tokens=1, temperature=0.9, top_k=top_k, top_p=top_p)
    other = Sampling(max_tokens=1, temperature=0.9, top_k=40, top_p=0.95)
    alone = filtered(logits / 0.9, Choice.of([sampling], 3000, CPU)).softmax(-1)
    mixed = filtered(logits / 0.9, Choice.of([sampling, other] * 10, 3000, CPU)).softmax(-1)
    for i, row in enumerate(logits):
        expected = reference(sampling, torch.zeros(0, dtype=torch.long), row)
        assert (alone[i] - expected).abs().max() < 1e-6
        if i % 2:
            expected = reference(other, torch.zeros(0, dtype=torch.long), row)
        assert (mixed[i] - expected).abs().max() < 1e-6


def test_ties_at_the_edge_are_kept():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    kept = filtered(scores, Choice.of([Sampling(max_tokens=1, top_k=1)], 4, CPU))
    assert (kept[0] > -1).tolist() == [False, True, True, False]
    both = Choice.of([Sampling(max_tokens=1, top_k=2, top_p=0.3)], 4, CPU)
    assert (filtered(scores, both)[0] > -1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("vocab", [BLOCK, 5 * BLOCK, 5 * BLOCK + 3, 7])
def test_blocks_change_no_token(vocab):
    generator = torch.Generator().manual_seed(vocab)
    probs = torch.rand(400, vocab, generator=generator)
    probs[probs < 0.9] = 0  # whole blocks are empty
    probs[:, 2] = 0.5
    numbers = torch.rand(400, dtype=torch.float64, generator=generator)
    numbers[:3] = torch.tensor([0.0, 1 - 2.0**-32, 0.5], dtype=torch.float64)
    summed = probs.cumsum(-1, dtype=torch.float64)
    wanted = torch.searchsorted(summed, numbers[:, None] * summed[:, -1:], right=True).squeeze(-1)
    found = inverse(probs, numbers)
    assert torch.equal(found, wanted)
    assert (probs.gather(-1, found[:, None]) > 0).all()


def split_mix(key, index):
    """Return what `uniforms` should, in whole numbers of any size."""
    mask = 2**64 - 1
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 32) / 2**32


def test_random_numbers_are_uniform_and_of_their_own():
    names = np.array([stream_key(7, f"r{i}") for i in range(2000)], np.uint64)
    keys = torch.from_numpy(names.view(np.int64))
    numbers = np.stack([uniforms(keys, torch.full((2000,), i)).numpy() for i in range(50)])
    for i in (0, 1, 49):
        assert numbers[i, :100].tolist() == [split_mix(int(k), i) for k in names[:100]]
    assert ((numbers >= 0) & (numbers < 1)).all()
    counts, _ = np.histogram(numbers, 100)
    # chi-square of 99 degrees of freedom: mean 99, standard deviation 14
    assert abs(((counts - 1000) ** 2 / 1000).sum() - 99) < 70
    assert abs(np.corrcoef(numbers[0], numbers[1])[0, 1]) < 0.08
    assert abs(np.corrcoef(numbers[0, :-1], numbers[0, 1:])[0, 1]) < 0.08
    assert len(np.unique(keys)) == 2000
    assert stream_key(7, "r0") != stream_key(8, "r0")
    alone = uniforms(keys[5:6], torch.tensor([3]))
    assert alone[0] == numbers[3, 5]
