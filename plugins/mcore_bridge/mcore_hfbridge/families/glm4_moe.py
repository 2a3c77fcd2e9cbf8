"""glm4_moe: GLM-4.5 and 4.6, DeepSeek-V3's experts on grouped attention."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family, Rule
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.hf_moe import after_dense, sigmoid_experts
from mcore_core.model.tables import attention, decoder_layers, embedding, ending
from mcore_core.model.tables_latent import mtp, twins
from mcore_core.model.tables_moe import DEEPSEEK_MOE, MoENames, mlp_or_moe, stacked


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Glm4MoeConfig."""
    reader = ConfigReader(
        config,
        "glm4_moe",
        {
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408,
        },
    )
    width = reader.size("moe_intermediate_size")
    return llama_like(
        reader,
        partial=0.5,
        add_qkv_bias=reader.flag("attention_bias"),
        qk_layernorm=reader.flag("use_qk_norm"),
        mtp_layers=reader.count("num_nextn_predict_layers"),
        moe=sigmoid_experts(
            reader,
            after_dense(reader, 1),
            num_experts=reader.size("n_routed_experts", 128),
            shared_ffn_hidden_size=width * reader.count("n_shared_experts", 1) or None,
        ),
    )


def rules(a: Architecture, moe_names: MoENames = DEEPSEEK_MOE) -> list[Rule]:
    """Return the table."""
    return [
        *embedding(a, twins(a, "embed_tokens.weight")),
        *attention(a, decoder_layers(a)),
        *mlp_or_moe(a, moe_names),
        *ending(a, twins(a, "shared_head.head.weight")),
        *mtp(a, attention),
    ]


FAMILY = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    architecture=architecture,
    rules=rules,
    also_reads=(partial(rules, moe_names=stacked(DEEPSEEK_MOE)),),
)
