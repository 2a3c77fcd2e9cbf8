"""mixtral: mistral with experts in every layer."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.hf_moe import softmax_experts
from mcore_core.model.tables_moe import MIXTRAL_MOE, moe_decoder, stacked


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a MixtralConfig."""
    reader = ConfigReader(config, "mixtral", {"num_key_value_heads": 8, "rms_norm_eps": 1e-5})
    experts = softmax_experts(
        reader,
        range(reader.size("num_hidden_layers")),
        normalized=True,
        num_experts=reader.size("num_local_experts", 8),
        topk=reader.size("num_experts_per_tok", 2),
        ffn_hidden_size=reader.size("intermediate_size"),
    )
    window = reader.window_everywhere(reader.optional_size("sliding_window"))
    return llama_like(reader, theta=1e6, moe=experts, **window)


FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    architecture=architecture,
    rules=partial(moe_decoder, moe_names=MIXTRAL_MOE),
    also_reads=(partial(moe_decoder, moe_names=stacked(MIXTRAL_MOE)),),
)
