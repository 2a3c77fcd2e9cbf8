"""minimax_m2: sigmoid experts, norms on q and k over all heads, partial rope."""

from collections.abc import Mapping
from functools import partial as bind
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.hf_moe import sigmoid_experts
from mcore_core.model.tables_moe import MIXTRAL_MOE, moe_decoder, stacked


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a MiniMaxM2Config."""
    reader = ConfigReader(
        config,
        "minimax_m2",
        {"num_key_value_heads": 8, "head_dim": 128, "num_experts_per_tok": 8},
    )
    reader.only("scoring_func", "sigmoid", "experts are scored by sigmoid here")
    reader.only("use_routing_bias", True, "there always is a bias for the choice of experts")
    reader.only("use_qk_norm", True, "there always are norms on q and k")
    rotated = reader.get("rotary_dim")
    partial = 1.0 if rotated is None else rotated / reader.size("head_dim")
    return llama_like(
        reader,
        partial=partial,
        theta=5e6,
        qk_layernorm=True,
        qk_norm_width="full",
        moe=sigmoid_experts(
            reader,
            range(reader.size("num_hidden_layers")),
            num_experts=reader.size("num_local_experts", 256),
            ffn_hidden_size=reader.size("intermediate_size"),
        ),
    )


FAMILY = Family(
    name="minimax_m2",
    architectures=("MiniMaxM2ForCausalLM",),
    architecture=architecture,
    rules=bind(moe_decoder, moe_names=MIXTRAL_MOE),
    also_reads=(bind(moe_decoder, moe_names=stacked(MIXTRAL_MOE)),),
)
