"""ernie4_5_moe: softmax experts with a bias for the choice, in the upper layers."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.hf_moe import softmax_experts
from mcore_core.model.tables_moe import MoENames, moe_decoder, stacked


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Ernie4_5_MoeConfig."""
    reader = ConfigReader(
        config,
        "ernie4_5_moe",
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    )
    reader.only("use_bias", False, "experts, their router and the output layer have no biases here")
    reader.only("num_nextn_predict_layers", 0, "its multi-token prediction layers cannot be built")
    reader.number("moe_norm_min", 1e-12)  # softmax over the chosen ones cannot come near it
    layers = reader.size("num_hidden_layers")
    last = reader.get("moe_layer_end_index")
    last = layers - 1 if last in (None, -1) else last
    every, first = reader.size("moe_layer_interval", 1), reader.count("moe_layer_start_index", 1)
    width, shared = (
        reader.size("moe_intermediate_size", 1536),
        reader.count("moe_num_shared_experts", 2),
    )
    return llama_like(
        reader,
        theta=5e5,
        rotary_interleaved=True,
        moe=softmax_experts(
            reader,
            [i for i in range(first, min(last + 1, layers)) if (i + 1) % every == 0],
            normalized=True,
            num_experts=reader.size("moe_num_experts", 64),
            topk=reader.size("moe_k", 6),
            ffn_hidden_size=width,
            expert_bias=True,
            shared_ffn_hidden_size=width * shared or None,
        ),
    )


NAMES = MoENames(expert_bias="moe_statics.e_score_correction_bias", bias_has_axis=True)
IN_MEMORY = replace(stacked(NAMES), expert_bias=f"gate.{NAMES.expert_bias}")


FAMILY = Family(
    name="ernie4_5_moe",
    architectures=("Ernie4_5_MoeForCausalLM",),
    architecture=architecture,
    rules=partial(moe_decoder, moe_names=NAMES),
    also_reads=(partial(moe_decoder, moe_names=IN_MEMORY),),
    notes=("multi-token prediction layers are refused",),
)
