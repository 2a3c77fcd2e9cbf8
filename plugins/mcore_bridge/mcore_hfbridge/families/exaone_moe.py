"""exaone_moe: K-EXAONE, sigmoid experts, windows, no positions in layers without window."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family, Rule
from mcore_core.model.hf_config import FULL, WINDOWED, ConfigReader, llama_like
from mcore_core.model.hf_moe import sigmoid_experts, sparse_layers
from mcore_core.model.tables_linear import qwen_mtp
from mcore_core.model.tables_moe import DEEPSEEK_MOE, MoENames, moe_decoder, stacked


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read an ExaoneMoeConfig."""
    reader = ConfigReader(
        config,
        "exaone_moe",
        {
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-5,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "routed_scaling_factor": 2.5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
    )
    layers, window = reader.size("num_hidden_layers"), reader.optional_size("sliding_window")
    every = reader.get("sliding_window_pattern")
    if reader.get("layer_types") is None and not isinstance(every, int):
        reader.refuse("sliding_window_pattern", "without layer_types it must be a number", "add it")
    every = every if window and isinstance(every, int) else 1
    usual = [WINDOWED if (i + 1) % every else FULL for i in range(layers)]
    kinds = reader.layer_kinds(layers, usual)
    without = [i for i, kind in enumerate(kinds) if window and kind == FULL]
    predicts = reader.predictions()  # by a layer like the first, with positions in any case
    kinds = (*kinds, *kinds[:predicts])
    width = reader.size("moe_intermediate_size", 1024)
    return llama_like(
        reader,
        qk_layernorm=True,
        no_rope_layers=tuple(without),
        mtp_layers=predicts,
        mtp_dense=True,
        moe=sigmoid_experts(
            reader,
            sparse_layers(reader, first_dense=reader.count("first_k_dense_replace", 1)),
            ffn_hidden_size=width,
            shared_ffn_hidden_size=width * reader.count("num_shared_experts", 1) or None,
        ),
        **reader.window_of(kinds, window),
    )


NAMES = replace(DEEPSEEK_MOE, expert_bias="e_score_correction_bias")


def rules(a: Architecture, moe_names: MoENames = NAMES) -> list[Rule]:
    """Return the table."""
    return [*moe_decoder(a, moe_names), *qwen_mtp(a)]


FAMILY = Family(
    name="exaone_moe",
    architectures=("ExaoneMoeForCausalLM",),
    architecture=architecture,
    rules=rules,
    also_reads=(partial(rules, moe_names=stacked(DEEPSEEK_MOE)),),
)
