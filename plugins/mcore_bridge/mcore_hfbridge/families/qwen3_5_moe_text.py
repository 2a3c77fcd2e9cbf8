"""qwen3_5_moe_text: Qwen3.5's text model with experts in every layer."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family, Rule
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.hf_moe import delta_net_shape, softmax_experts
from mcore_core.model.tables import embedding, ending
from mcore_core.model.tables_linear import mixed_attention, qwen_mtp
from mcore_core.model.tables_moe import QWEN_MOE, MoENames, mlp_or_moe, stacked


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Qwen3_5MoeTextConfig."""
    defaults = {"num_key_value_heads": 2, "head_dim": 256}
    defaults |= {"num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512}
    reader = ConfigReader(config, "qwen3_5_moe_text", defaults)
    reader.only("attention_bias", False, "gated attention has no biases here")
    layers = range(reader.size("num_hidden_layers"))
    shared = reader.size("shared_expert_intermediate_size", 512)
    return llama_like(
        reader,
        partial=0.25,
        zero_centered_gamma=True,
        qk_layernorm=True,
        attention_output_gate=True,
        linear_attention=delta_net_shape(reader),
        mtp_layers=reader.predictions("mtp_num_hidden_layers"),
        ffn_hidden_size=reader.size("moe_intermediate_size"),  # no layer is dense
        moe=softmax_experts(
            reader, layers, normalized=True, shared_ffn_hidden_size=shared, shared_gate=True
        ),
    )


def rules(a: Architecture, moe_names: MoENames = QWEN_MOE) -> list[Rule]:
    """Return the table."""
    return [
        *embedding(a),
        *mixed_attention(a, fused=False),
        *mlp_or_moe(a, moe_names),
        *ending(a),
        *qwen_mtp(a),
    ]


FAMILY = Family(
    name="qwen3_5_moe_text",
    architectures=("Qwen3_5MoeForCausalLM",),
    architecture=architecture,
    rules=rules,
    also_reads=(partial(rules, moe_names=stacked(QWEN_MOE)),),
    mtp_key="mtp_num_hidden_layers",
)
