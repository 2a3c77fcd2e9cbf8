"""ernie4_5_moe: softmax experts with a bias for the choice, in the upper layers.

Its prediction layer is dense and ends in the decoder's own norm, as in Baidu's FastDeploy.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family, Rule
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.hf_moe import softmax_experts
from mcore_core.model.tables import (
    COLUMN,
    Block,
    attention,
    dense_mlp,
    linear,
    norm,
    prediction_shape,
)
from mcore_core.model.tables_moe import MoENames, moe_decoder, stacked


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Ernie4_5_MoeConfig."""
    reader = ConfigReader(
        config,
        "ernie4_5_moe",
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    )
    reader.only("use_bias", False, "experts, their router and the output layer have no biases here")
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
        mtp_layers=reader.predictions(),
        mtp_dense=True,
        mtp_norm=False,
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


def rules(a: Architecture, moe_names: MoENames = NAMES) -> list[Rule]:
    """Return the table; parts of a prediction layer are numbered each for itself."""
    out = moe_decoder(a, moe_names)
    for i in range(a.mtp_layers):
        outer = Block("model.", f"mtp.layers.{i}.")
        inner = Block(f"model.mtp_block.{i}.", outer.mcore + "transformer_layer.")
        out += norm(a, outer, f"mtp_emb_norm.{i}", "enorm")
        out += norm(a, outer, f"mtp_hidden_norm.{i}", "hnorm")
        out += linear(outer, f"mtp_linear_proj.{i}", "eh_proj", prediction_shape(a), COLUMN)
        out += [*attention(a, inner), *dense_mlp(a, inner)]
    return out


FAMILY = Family(
    name="ernie4_5_moe",
    architectures=("Ernie4_5_MoeForCausalLM",),
    architecture=architecture,
    rules=rules,
    also_reads=(partial(rules, moe_names=IN_MEMORY),),
)
