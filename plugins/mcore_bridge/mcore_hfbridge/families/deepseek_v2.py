"""deepseek_v2: latent attention (V2-Lite without q_lora_rank), softmax experts."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.hf_moe import after_dense, expert_groups, latent_attention, softmax_experts
from mcore_core.model.tables_latent import mla_decoder
from mcore_core.model.tables_moe import DEEPSEEK_MOE, stacked


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a DeepseekV2Config."""
    reader = ConfigReader(config, "deepseek_v2", {"moe_intermediate_size": 1407})
    reader.only("scoring_func", "softmax", "experts are scored by softmax here")
    reader.only("norm_topk_prob", False, "weights of the chosen experts are not normalized")
    reader.only("mlp_bias", False, "experts have no biases here")
    rope = reader.rope(reader.size("max_position_embeddings", 2048))
    width = reader.size("moe_intermediate_size")
    experts, topk = reader.size("n_routed_experts", 64), reader.size("num_experts_per_tok")
    grouped = reader.choice("topk_method", "greedy", ("greedy", "group_limited_greedy")) != "greedy"
    limit = expert_groups(reader, experts, topk)  # greedy choice leaves groups aside
    latent = latent_attention(reader, rope, q_lora_rank=1536)
    return llama_like(
        reader,
        moe=softmax_experts(
            reader,
            after_dense(reader, 0),
            normalized=False,
            num_experts=experts,
            topk=topk,
            **(limit if grouped else {}),
            scaling_factor=reader.number("routed_scaling_factor", 1.0),
            shared_ffn_hidden_size=width * reader.count("n_shared_experts", 2) or None,
        ),
        **(latent | {"rotary_interleaved": True}),
    )


FAMILY = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    architecture=architecture,
    rules=mla_decoder,
    also_reads=(partial(mla_decoder, moe_names=stacked(DEEPSEEK_MOE)),),
)
