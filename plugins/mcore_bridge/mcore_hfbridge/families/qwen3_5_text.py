"""qwen3_5_text: Qwen3.5's text model, dense, gated delta nets in three layers of four."""

from collections.abc import Mapping
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family, Rule
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.hf_moe import delta_net_shape
from mcore_core.model.tables import decoder_layers, dense_mlp, embedding, ending
from mcore_core.model.tables_linear import mixed_attention, qwen_mtp


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Qwen3_5TextConfig."""
    defaults = {"num_key_value_heads": 4, "head_dim": 256}
    reader = ConfigReader(config, "qwen3_5_text", defaults)
    reader.only("attention_bias", False, "gated attention has no biases here")
    return llama_like(
        reader,
        partial=0.25,
        zero_centered_gamma=True,
        qk_layernorm=True,
        attention_output_gate=True,
        linear_attention=delta_net_shape(reader),
        mtp_layers=reader.predictions("mtp_num_hidden_layers"),
    )


def rules(a: Architecture) -> list[Rule]:
    """Return the table."""
    return [
        *embedding(a),
        *mixed_attention(a, fused=False),
        *dense_mlp(a, decoder_layers(a)),
        *ending(a),
        *qwen_mtp(a),
    ]


FAMILY = Family(
    name="qwen3_5_text",
    architectures=("Qwen3_5ForCausalLM",),
    architecture=architecture,
    rules=rules,
    mtp_key="mtp_num_hidden_layers",
)
