"""Real megatron ranks with a bridge: build a layout's chunks for an HF folder."""

import torch
from mcore_hfbridge.bridge import HFBridge
from mcore_hfbridge.families import llama, qwen2, qwen3

from mcore_core.config.kernel import kernel_config
from mcore_core.model.resolve import read_hf_config
from mcore_core.parallel.topology import Layout

SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": {"num_key_value_heads": 4, "head_dim": 6, "rope_parameters": LLAMA3},
    "llama-biases": {
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama-tied": {"num_key_value_heads": 8, "hidden_size": 32, "tie_word_embeddings": True},
    "qwen2": {
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    "qwen3": {"num_key_value_heads": 4, "head_dim": 10},
    "qwen3-tied": {"num_key_value_heads": 1, "head_dim": 6, "tie_word_embeddings": True},
}
FAMILIES = {"llama": llama.FAMILY, "qwen2": qwen2.FAMILY, "qwen3": qwen3.FAMILY}


def write(folder, name, seed=7):
    """Save a random model, every tensor drawn, and return it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name.split("-")[0], **{**SMALL, **MODELS[name]})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.normal_(mean=1.0 if "norm" in key else 0.0, std=0.2)
    model.save_pretrained(folder)
    return model.eval()


def build(folder, name, **sizes):
    """Return the bridge and this rank's chunks, at random; joins megatron's groups."""
    from mcore_core import compat
    from mcore_core.parallel.state import initialize
    from mcore_core.platform import install

    compat.apply()
    from mcore_core.model.build import ModelPlan, build_chunks, decoder_config

    layout = Layout(**sizes)
    initialize(install(), layout)
    family = FAMILIES[name.split("-")[0]]
    architecture = family.architecture(read_hf_config(folder))
    each = architecture.num_layers // layout.stages
    plan = ModelPlan(
        architecture=architecture,
        layout=layout,
        stage_layers=[each] * layout.stages,
        dtype=torch.float32,
        transformer_engine=False,
    )
    config = decoder_config(plan, kernel_config(model=str(folder)), on_cpu=True)
    return HFBridge(family, architecture), build_chunks(plan, config)
