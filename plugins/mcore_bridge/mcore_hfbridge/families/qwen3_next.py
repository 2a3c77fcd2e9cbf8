"""qwen3_next: gated delta nets, gated attention in every fourth layer, experts."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family, Rule
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.hf_moe import delta_net_shape, qwen_sparse_layers, softmax_experts
from mcore_core.model.tables import embedding, ending
from mcore_core.model.tables_linear import mixed_attention, qwen_mtp
from mcore_core.model.tables_moe import QWEN_MOE, MoENames, mlp_or_moe, stacked


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Qwen3NextConfig."""
    defaults = {"num_key_value_heads": 2, "head_dim": 256, "norm_topk_prob": True}
    defaults |= {"num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512}
    reader = ConfigReader(config, "qwen3_next", defaults)
    reader.only("attention_bias", False, "gated attention has no biases here")
    return llama_like(
        reader,
        partial=0.25,
        zero_centered_gamma=True,
        qk_layernorm=True,
        attention_output_gate=True,
        linear_attention=delta_net_shape(reader),
        mtp_layers=reader.predictions(),
        moe=softmax_experts(
            reader,
            qwen_sparse_layers(reader),
            shared_ffn_hidden_size=reader.size("shared_expert_intermediate_size", 512),
            shared_gate=True,
        ),
    )


def rules(a: Architecture, moe_names: MoENames = QWEN_MOE) -> list[Rule]:
    """Return the table."""
    return [
        *embedding(a),
        *mixed_attention(a),
        *mlp_or_moe(a, moe_names),
        *ending(a),
        *qwen_mtp(a),
    ]


FAMILY = Family(
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    architecture=architecture,
    rules=rules,
    also_reads=(partial(rules, moe_names=stacked(QWEN_MOE)),),
)
