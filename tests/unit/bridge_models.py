"""Random tiny HF models of every family, and megatron ranks simulated without processes."""

import torch
from mcore_hfbridge.export import flatten, scatter, transfers_of
from mcore_hfbridge.families import llama, qwen2, qwen3
from mcore_hfbridge.plan import Plan
from mcore_hfbridge.ranks import Held, Ranks

from mcore_core.model.resolve import read_hf_config

SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
"""Odd on purpose: 101 rows are divisible by no tensor-parallel size."""

MODELS = {
    "llama": {"num_key_value_heads": 4, "head_dim": 6},
    "llama-tied": {"num_key_value_heads": 8, "tie_word_embeddings": True},
    "llama-biases": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"num_key_value_heads": 2},
    "qwen2-tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 10},
    "qwen3-tied": {"num_key_value_heads": 1, "head_dim": 6, "tie_word_embeddings": True},
}
FAMILIES = {"llama": llama.FAMILY, "qwen2": qwen2.FAMILY, "qwen3": qwen3.FAMILY}


def write(folder, name, **changes):
    """Save a random model and return it: every tensor drawn, norms and biases too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family(name).name, **{**SMALL, **MODELS[name], **changes})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.normal_(mean=1.0 if "norm" in key else 0.0, std=0.2)
    model.save_pretrained(folder)
    return model.eval()


def family(name):
    return FAMILIES[name.split("-")[0]]


def plan_for(folder, name):
    return Plan(family(name), family(name).architecture(read_hf_config(folder)))


def empty_ranks(plan, tp, pp=1, layers=3, dtype=torch.float32):
    """Return one dict of weights a rank (tensor-parallel ranks of stage 0 first), full of NaN."""
    out = []
    for stage in range(pp):
        for _ in range(tp):
            weights = {}
            for w in plan.weights.values():
                layer = w.index.get("l")
                at = 0 if w.name.startswith("embedding") else pp - 1
                if layer is not None:
                    at = layer * pp // layers
                if at == stage:
                    shape = w.rule.shape
                    if w.rule.pad:
                        shape = (-(-shape[0] // tp) * tp, *shape[1:])
                    local = w.rule.shard.local_shape(shape, tp)
                    weights[w.name] = torch.full(local, float("nan"), dtype=dtype)
            out.append(weights)
    return out


def rank_of(weights_of, rank, tp):
    """Return the Ranks that rank `rank` would see."""
    members = tuple(
        (r % tp, {n: Held(tuple(w.shape), w.dtype) for n, w in weights.items()})
        for r, weights in enumerate(weights_of)
    )
    return Ranks(rank=rank, size=len(weights_of), tp_rank=rank % tp, tp_size=tp, members=members)


def assemble_all(plan, weights_of, tp):
    """Return every HF tensor, from what each simulated rank gives."""
    ranks = rank_of(weights_of, 0, tp)
    whole = {n: torch.full(p.shape, float("nan")) for n, p in plan.hf.items()}
    for (owner, _), transfers in transfers_of(plan, ranks, list(plan.hf)).items():
        scatter(whole, transfers, flatten(weights_of[owner], transfers))
    return whole
