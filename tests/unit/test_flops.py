"""The formula of a step's arithmetic against torch's own count of transformers' models."""

import dataclasses

import pytest
import torch
from family_cases import CASES, SIZES, family_of, hf_config, quiet

from mcore_core.train.flops import (
    StepSize,
    causal_pairs,
    forward_flops,
    step_flops,
    token_flops,
)

TOKENS = 24
DENSE = ["llama", "qwen3", "starcoder2", "gemma3_text"]
EXPERTS = ["mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v2-lite", "deepseek_v3", "gpt_oss"]


def counted(case, *, backward=False):
    """torch's count for one sequence; eager attention computes every pair of it."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    quiet()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config(case), dtype=torch.float32)
    tokens = torch.arange(TOKENS).unsqueeze(0)
    counter = FlopCounterMode(display=False)
    with counter:
        loss = model(tokens, use_cache=False).logits.sum()
        if backward:
            loss.backward()
    return counter.get_total_flops()


def shape_of(case):
    return family_of(case).architecture(hf_config(case).to_dict() | {"model_type": case.family})


def all_pairs(tokens=TOKENS):
    return StepSize(
        tokens=tokens, head_tokens=tokens, pairs=tokens**2, window_pairs=tokens**2
    )  # fmt: skip


@pytest.mark.parametrize("name", DENSE + EXPERTS)
def test_forward_equals_torch(name):
    """Grouped queries, biases, windows, latent attention, chosen and shared experts, routers."""
    case = CASES[name]
    shape = shape_of(case)
    ours = forward_flops(shape, all_pairs())
    theirs = counted(case)
    # torch counts the rotation's outer product of positions and frequencies too: nothing else
    rope = 2 * TOKENS * sum(rotary_sizes(case)) // 2
    assert theirs - rope <= ours <= theirs


def rotary_sizes(case):
    """Sizes of the rotary tables that transformers computes by a matrix product."""
    config = hf_config(case).to_dict()
    size = config.get("qk_rope_head_dim") or config.get("head_dim") or 32 // 4
    return [size, size]  # at most two tables: one for each kind of layer


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_a_step_is_three_passes(name):
    case = CASES[name]
    ours = step_flops(shape_of(case), all_pairs())
    # torch leaves out the gradient of what enters the first products: embeddings have none there
    assert ours == pytest.approx(counted(case, backward=True), rel=0.01)


def test_frozen_weights_have_no_gradient():
    shape = shape_of(CASES["qwen3"])
    size = StepSize(tokens=100, head_tokens=100, pairs=0)
    whole, frozen = step_flops(shape, size), step_flops(shape, size, trained=0.0)
    assert frozen == pytest.approx(whole * 2 / 3)


def test_a_gated_delta_net_by_hand():
    """Per token and head: the state is read, corrected, read; loops written out."""
    case = CASES["qwen3_next"]
    shape = shape_of(case)
    moe = case.config
    count = 0
    hidden, keys, values, heads = SIZES["hidden_size"], 2 * 6, 4 * 8, 4
    for rows in (2 * keys, 2 * values, 2 * heads):  # q k, v and gate, beta and decay
        count += 2 * hidden * rows
    count += 2 * values * hidden  # out
    count += 2 * 3 * (2 * keys + values)  # convolution of 3 taps
    for _ in range(heads):
        for _ in range(6):
            for _ in range(8):
                count += 2 + 2 + 2
    full = 2 * hidden * (2 * 4 * 16 + 2 * 2 * 16 + 4 * 16)  # attention with a gate of the output
    inside = moe["num_experts_per_tok"] * moe["moe_intermediate_size"]
    inside += moe["shared_expert_intermediate_size"]
    mlp = 2 * 3 * hidden * inside + 2 * hidden * moe["num_experts"] + 2 * hidden
    assert token_flops(shape) == count + full + 2 * mlp


def test_pairs_of_packed_sequences():
    """A packed row costs the sum of its sequences, not the square of its length."""
    lengths = (5, 1, 9)
    plain = sum(i + 1 for n in lengths for i in range(n))
    windowed = sum(min(i + 1, 4) for n in lengths for i in range(n))
    assert causal_pairs(lengths) == plain
    assert causal_pairs(lengths, 4) == windowed
    assert causal_pairs(lengths, 100) == plain
    assert causal_pairs((15,)) > causal_pairs(lengths)


def test_windows_and_the_head_count_where_they_are():
    shape = shape_of(CASES["gemma3_text"])
    assert shape.window_layers == (0,)
    size = StepSize(tokens=0, head_tokens=0, pairs=10, window_pairs=3)
    width = 2 * shape.num_attention_heads * 2 * shape.kv_channels
    assert forward_flops(shape, size) == width * (10 + 3)
    head = StepSize(tokens=0, head_tokens=7, pairs=0)
    assert forward_flops(shape, head) == 2 * 7 * shape.vocab_size * shape.hidden_size


def test_prediction_layers_are_counted():
    shape = dataclasses.replace(shape_of(CASES["qwen3"]), mtp_layers=1)
    size = StepSize(tokens=10, head_tokens=10, pairs=0)
    extra = step_flops(shape, size, depths=1) - step_flops(shape, size)
    layer = token_flops(shape) / shape.num_layers
    joined = 2 * 2 * shape.hidden_size**2
    head = 2 * shape.vocab_size * shape.hidden_size
    assert extra == pytest.approx(3 * 10 * (layer + joined + head))
