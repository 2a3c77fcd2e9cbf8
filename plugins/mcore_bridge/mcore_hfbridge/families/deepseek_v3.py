"""deepseek_v3: latent attention, sigmoid experts in groups, multi-token prediction."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.hf_moe import after_dense, latent_attention, sigmoid_experts
from mcore_core.model.tables_latent import mla_decoder
from mcore_core.model.tables_moe import DEEPSEEK_MOE, stacked


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a DeepseekV3Config."""
    defaults: dict[str, Any] = {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}
    defaults |= {"moe_intermediate_size": 2048, "routed_scaling_factor": 2.5}
    reader = ConfigReader(config, "deepseek_v3", defaults)
    reader.only("scoring_func", "sigmoid", "experts are scored by sigmoid here")
    rope = reader.rope(reader.size("max_position_embeddings", 4096))
    width = reader.size("moe_intermediate_size")
    return llama_like(
        reader,
        mtp_layers=reader.count("num_nextn_predict_layers"),
        moe=sigmoid_experts(
            reader,
            after_dense(reader, 3),
            num_experts=reader.size("n_routed_experts", 256),
            shared_ffn_hidden_size=width * reader.count("n_shared_experts", 1) or None,
        ),
        **latent_attention(reader, rope, q_lora_rank=1536),
    )


FAMILY = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    architecture=architecture,
    rules=mla_decoder,
    also_reads=(partial(mla_decoder, moe_names=stacked(DEEPSEEK_MOE)),),
)
