"""Checkpoints with multi-token prediction layers, which transformers neither loads nor saves."""

import json

import torch
from family_cases import CASES, save_tensors, tensors_of, write

LAYERS = 2
"""Of the decoder, in every case here."""


INNER = {"ernie4_5_moe": (0, {}), "exaone_moe": (0, {"mlp_layer_types": ["dense", "sparse"]})}
"""The layer of another model that a prediction layer is, and what that model's config changes."""
LAST = (LAYERS - 1, {})
KEYS = dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), "mtp_num_hidden_layers")
"""What tells of prediction layers in config.json, where it is not num_nextn_predict_layers."""


def key_of(name):
    return KEYS.get(name, "num_nextn_predict_layers")


def renamed(name, inner, to):
    """Return the tensors of the other model's layer under a prediction layer's names."""
    start = f"model.layers.{INNER.get(name, LAST)[0]}."
    return {to + k.removeprefix(start): t for k, t in inner.items() if k.startswith(start)}


def deepseek_names(name, tensors, inner):
    """Return what a DeepSeek checkpoint has beyond the decoder: one more layer, and copies."""
    to = f"model.layers.{LAYERS}."
    return {
        **renamed(name, inner, to),
        **norms_and_projection(to, "enorm", "hnorm", "eh_proj", "shared_head.norm"),
        to + "embed_tokens.weight": tensors["model.embed_tokens.weight"],
        to + "shared_head.head.weight": tensors["lm_head.weight"],
    }


def hunyuan_names(name, tensors, inner):
    to = f"model.layers.{LAYERS}."
    return {
        **renamed(name, inner, to),
        **norms_and_projection(to, "enorm", "hnorm", "eh_proj", "final_layernorm"),
    }


def qwen_names(name, tensors, inner):
    names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
    return {**renamed(name, inner, "mtp.layers.0."), **norms_and_projection("mtp.", *names)}


def mimo_names(name, tensors, inner):
    to = "model.mtp_layers.0."
    names = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
    return {**renamed(name, inner, to), **norms_and_projection(to, *names)}


def ernie_names(name, tensors, inner):
    names = ("mtp_emb_norm.0", "mtp_hidden_norm.0", "mtp_linear_proj.0", "norm")
    return {
        **renamed(name, inner, "model.mtp_block.0."),
        **norms_and_projection("model.", *names),
        "model.norm.weight": tensors["model.norm.weight"],
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
    "qwen3_5_text": qwen_names,
    "qwen3_5_moe_text": qwen_names,
    "exaone_moe": qwen_names,
    "ernie4_5_moe": ernie_names,
    "hy_v3": hunyuan_names,
    "mimo": mimo_names,
}


def write_mtp(folder, name):
    """Save a case's model with one prediction layer, whose inner layer is one of another model.

    Return the model, the inner layer's model and the number of that layer in it, and all tensors.
    """
    model = write(folder, CASES[name])
    layer, changes = INNER.get(name, LAST)
    other = write(folder / "other", CASES[name], seed=8, **changes)
    tensors = tensors_of(folder)
    own = WRITERS[name](name, tensors, tensors_of(folder / "other"))
    save_tensors({**tensors, **{k: t.clone() for k, t in own.items()}}, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, key_of(name): 1}))
    return model, (other, layer), tensors_of(folder)
