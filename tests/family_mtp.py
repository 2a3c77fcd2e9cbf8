"""Checkpoints with multi-token prediction layers, which transformers neither loads nor saves."""

import json

import torch
from family_cases import CASES, save_tensors, tensors_of, write

LAYERS = 2
"""Of the decoder, in every case here."""


def deepseek_names(tensors, inner):
    """Return what a DeepSeek checkpoint has beyond the decoder: one more layer, and copies."""
    last = f"model.layers.{LAYERS - 1}."
    to = f"model.layers.{LAYERS}."
    return {
        **{to + k.removeprefix(last): t for k, t in inner.items() if k.startswith(last)},
        **norms_and_projection(to, "enorm", "hnorm", "eh_proj", "shared_head.norm"),
        to + "embed_tokens.weight": tensors["model.embed_tokens.weight"],
        to + "shared_head.head.weight": tensors["lm_head.weight"],
    }


def qwen_names(tensors, inner):
    last = f"model.layers.{LAYERS - 1}."
    return {
        **{
            "mtp.layers.0." + k.removeprefix(last): t
            for k, t in inner.items()
            if k.startswith(last)
        },
        **norms_and_projection("mtp.", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
    }


def mimo_names(tensors, inner):
    last, to = f"model.layers.{LAYERS - 1}.", "model.mtp_layers.0."
    names = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
    return {
        **{to + k.removeprefix(last): t for k, t in inner.items() if k.startswith(last)},
        **norms_and_projection(to, *names),
    }


def norms_and_projection(prefix, embedding, hidden, projection, final):
    vectors = {n: 1 + 0.2 * torch.randn(32) for n in (embedding, hidden, final)}
    tensors = {**vectors, projection: torch.randn(32, 64) / 8}
    return {f"{prefix}{n}.weight": t for n, t in tensors.items()}


WRITERS = {
    "deepseek_v3": deepseek_names,
    "kimi_k2": deepseek_names,
    "glm4_moe": deepseek_names,
    "qwen3_next": qwen_names,
    "mimo": mimo_names,
}


def write_mtp(folder, name):
    """Save a case's model with one prediction layer, whose inner layer is another model's last.

    Return both models, and all tensors.
    """
    model = write(folder, CASES[name])
    other = write(folder / "other", CASES[name], seed=8)
    tensors = tensors_of(folder)
    own = WRITERS[name](tensors, tensors_of(folder / "other"))
    save_tensors({**tensors, **{k: t.clone() for k, t in own.items()}}, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return model, other, tensors_of(folder)
