"""Random tiny HF models of every family: odd sizes, and every tensor drawn."""

import json
import math
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from mcore_hfbridge.plan import Plan
from safetensors.torch import load_file, save_file

from mcore_core.model.resolve import read_hf_config
from mcore_core.parallel.topology import Layout

VOCAB = 101
"""Divisible by no tensor-parallel size."""
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


DENSE_LAYOUTS = {
    "TP2": Layout(world=2, tp=2),
    "PP2": Layout(world=2, pp=2),
    "TP2+PP2": Layout(world=4, tp=2, pp=2, sp=True),
}
MOE_LAYOUTS = {
    "TP2+EP2": Layout(world=2, tp=2, ep=2, sp=True),
    "EP2": Layout(world=2, ep=2),
    "PP2": Layout(world=2, pp=2),
    "TP2+ETP2": Layout(world=2, tp=2, etp=2, sp=True),
    "TP2+PP2": Layout(world=4, tp=2, pp=2, sp=True),
    "PP2+EP2": Layout(world=4, pp=2, ep=2),
}


def layouts_of(case):
    return MOE_LAYOUTS if case.moe else DENSE_LAYOUTS


@dataclass(frozen=True)
class FamilyCase:
    """One config of a family."""

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    hf_type: str = ""
    """transformers' model_type, where it has none of the family's name."""
    moe: bool = False
    module: str = ""
    """Where the family is, if not among the bridge's."""

    @property
    def model_type(self) -> str:
        return self.hf_type or self.family

    @property
    def layers(self) -> int:
        return self.config.get("num_hidden_layers", SIZES["num_hidden_layers"])


def dense(family, **config):
    return FamilyCase(family, config)


def experts(family, **config):
    hf_type = config.pop("hf_type", "")
    return FamilyCase(family, config, hf_type, moe=True)


WINDOWED = {"sliding_window": 5}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
SHARED = {"shared_expert_intermediate_size": 28}
DEEPSEEK_MOE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
}
UNGROUPED = {"n_group": 1, "topk_group": 1}
THREE_GROUPS = {"n_group": 4, "topk_group": 3}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
GDN = {
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
}
NO_MTP = {"num_nextn_predict_layers": 0}
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}

CASES: dict[str, FamilyCase] = {
    "llama": dense("llama", head_dim=6, rope_parameters=LLAMA3),
    "llama-biases-tied": dense("llama", attention_bias=True, mlp_bias=True, **TIED),
    "mistral": dense("mistral", head_dim=10, **WINDOWED),
    "ministral": dense(
        "ministral",
        head_dim=10,
        layer_types=["sliding_attention", "full_attention"],
        **WINDOWED,
    ),
    "mixtral": experts("mixtral", head_dim=6, num_local_experts=4, **WINDOWED),
    "qwen2": dense("qwen2", use_sliding_window=True, max_window_layers=1, **WINDOWED),
    "qwen2-tied": dense("qwen2", **TIED),
    "qwen2_moe": experts(
        "qwen2_moe",
        num_hidden_layers=4,
        mlp_only_layers=[1],
        use_sliding_window=True,
        **WINDOWED,
        **QWEN_MOE,
        **SHARED,
    ),
    "qwen3": dense("qwen3", head_dim=10, attention_bias=True),
    "qwen3-tied": dense("qwen3", head_dim=6, num_key_value_heads=1, **TIED),
    "qwen3_moe": experts(
        "qwen3_moe",
        head_dim=10,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        attention_bias=True,
        **QWEN_MOE,
    ),
    "qwen3_next": experts("qwen3_next", **GDN, **QWEN_MOE, **SHARED),
    "qwen3_5_text": dense("qwen3_5_text", **GDN),
    "qwen3_5_moe_text": experts("qwen3_5_moe_text", **GDN, **QWEN_MOE, **SHARED),
    "deepseek_v2": experts(
        "deepseek_v2",
        **DEEPSEEK_MOE | MLA | THREE_GROUPS | {"norm_topk_prob": False},
        topk_method="group_limited_greedy",
        rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
    ),
    "deepseek_v2-lite": experts(
        "deepseek_v2",
        **DEEPSEEK_MOE | MLA | UNGROUPED | {"norm_topk_prob": False, "q_lora_rank": None},
    ),
    "deepseek_v3": experts(
        "deepseek_v3",
        **DEEPSEEK_MOE | THREE_GROUPS,
        **MLA,
        **NO_MTP,
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "kimi_k2": experts("kimi_k2", hf_type="deepseek_v3", **DEEPSEEK_MOE | MLA | UNGROUPED | NO_MTP),
    "glm": dense("glm", head_dim=12),
    "glm4": dense("glm4", head_dim=12),
    "glm4_moe": experts(
        "glm4_moe",
        **DEEPSEEK_MOE | UNGROUPED | NO_MTP,
        head_dim=12,
        use_qk_norm=True,
        attention_bias=True,
    ),
    "gpt_oss": experts(
        "gpt_oss",
        head_dim=10,
        num_local_experts=4,
        num_experts_per_tok=2,
        swiglu_limit=1.5,
        rope_parameters={**YARN, "truncate": False},
        **WINDOWED,
    ),
    "minimax_m2": experts(
        "minimax_m2", head_dim=12, num_local_experts=4, num_experts_per_tok=2, rotary_dim=6
    ),
    "ernie4_5": dense("ernie4_5", head_dim=10, use_bias=True, **TIED),
    "ernie4_5_moe": experts(
        "ernie4_5_moe",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=20,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        **UNTIED,
    ),
    "olmoe": experts(
        "olmoe", num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, attention_bias=True
    ),
    "internlm3": dense("internlm3", head_dim=10, attention_bias=True, mlp_bias=True),
    "mimo": FamilyCase("mimo", {}, "qwen2"),
    "gemma": dense("gemma", head_dim=10, **TIED),
    "gemma3_text": dense(
        "gemma3_text",
        head_dim=10,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
        },
        **TIED,
        **WINDOWED,
    ),
    "phi3": dense(
        "phi3",
        rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5},
        **WINDOWED,
    ),
    "smollm3": dense("smollm3", no_rope_layers=[1, 0], attention_bias=True, **TIED),
    "seed_oss": dense("seed_oss", head_dim=10, residual_dropout=0.0, mlp_bias=True),
    "helium": dense("helium", head_dim=8, attention_bias=True, mlp_bias=True),
    "cwm": dense(
        "cwm",
        head_dim=10,
        rope_parameters=LLAMA3,
        mlp_bias=True,
        layer_types=["sliding_attention", "full_attention"],
        bos_token_id=1,
        eos_token_id=2,
        **WINDOWED,
    ),
    "starcoder2": dense("starcoder2", **WINDOWED, **TIED),
    "stablelm": dense(
        "stablelm",
        use_qkv_bias=True,
        rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.25},
    ),
    "youtu": dense("youtu", **MLA, **TIED),
    "dots1": experts(
        "dots1",
        **DEEPSEEK_MOE | UNGROUPED,
        head_dim=10,
        attention_bias=True,
        layer_types=["sliding_attention", "full_attention"],
        **WINDOWED,
    ),
    "exaone_moe": experts(
        "exaone_moe",
        **QWEN_MOE,
        head_dim=10,
        layer_types=["sliding_attention", "full_attention"],
        mlp_layer_types=["sparse", "dense"],
        **WINDOWED,
    ),
    "hy_v3": experts("hy_v3", **QWEN_MOE, head_dim=10, attention_bias=True),
    "solar_open": experts("solar_open", **DEEPSEEK_MOE, head_dim=12, attention_bias=True),
}
"""At least one a family."""


def family_of(case):
    return import_module(case.module or f"mcore_hfbridge.families.{case.family}").FAMILY


def hf_config(case, **changes):
    from transformers import AutoConfig

    given = {**SIZES, **case.config, **changes}
    config = AutoConfig.for_model(case.model_type, **given)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def draw_(model, seed):
    """Draw every tensor, buffers that are saved too, so that logits spread and nothing is idle."""
    torch.manual_seed(seed)
    zero_centred = any(t in model.config.model_type for t in ("gemma", "qwen3_next", "qwen3_5"))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name and tensor.dim() == 1 and name.endswith("weight"):
                centred = zero_centred and "linear_attn.norm" not in name
                tensor.normal_(mean=0.0 if centred else 1.0, std=0.2)
            elif "e_score" in name:
                tensor.normal_(std=0.1)  # more, and some experts would be idle
            elif tensor.dim() == 1:
                tensor.normal_(std=0.3)
            elif "embed" in name:
                tensor.normal_(std=1.0)
            else:
                tensor.normal_(std=1.2 / math.sqrt(tensor.shape[-1]))


def quiet():
    """Keep transformers from drawing progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def write(folder, case, seed=7, **changes):
    """Save a random model, every tensor drawn, and return it."""
    from transformers import AutoModelForCausalLM

    quiet()
    model = AutoModelForCausalLM.from_config(hf_config(case, **changes), dtype=torch.float32)
    draw_(model, seed)
    save(model, case, folder)
    return model.eval()


def save(model, case, folder):
    model.save_pretrained(folder)
    path = folder / "config.json"
    found = json.loads(path.read_text())
    name = family_of(case).architectures[0]
    path.write_text(json.dumps({**found, "architectures": [name], "model_type": case.family}))


def plan_for(folder, case):
    family = family_of(case)
    return Plan(family, family.architecture(read_hf_config(folder)))


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def save_tensors(tensors, folder):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
