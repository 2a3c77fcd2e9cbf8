"""Mellum 2 (JetBrains): a model family in one file and one entry point, importing the kernel only.

`architecture` reads config.json, `rules` says how each tensor lies in a megatron-core weight.
Loading, saving, slicing for every layout and the check that no tensor is left over come with them:

    uv pip install ./examples/plugins/mellum
    mcore bridge coverage --model JetBrains/Mellum-2
    mcore run --plugin sft --model JetBrains/Mellum-2 --dataset FILE
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

from mcore_core import Component, Plugin, hookimpl
from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import FULL, WINDOWED, ConfigReader, llama_like
from mcore_core.model.hf_moe import softmax_experts, sparse_layers
from mcore_core.model.hf_rope import read_rope
from mcore_core.model.tables_moe import QWEN_MOE, moe_decoder, stacked

DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 896,
    "norm_topk_prob": True,
    "sliding_window": 1024,
}
"""Of transformers' MellumConfig, where they are not the usual ones."""


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a MellumConfig; everything that cannot be honoured is refused by name, all at once."""
    reader = ConfigReader(config, "mellum", DEFAULTS)
    reader.only("num_nextn_predict_layers", 0, "this plugin leaves out multi-token prediction")
    layers, bias = reader.size("num_hidden_layers"), reader.flag("attention_bias")
    kinds = reader.layer_kinds(layers, [FULL] * layers)
    return llama_like(
        reader,
        qk_layernorm=True,
        add_qkv_bias=bias,
        attention_output_bias=bias,
        moe=softmax_experts(reader, sparse_layers(reader, first_dense=0)),
        **reader.window_of(kinds, reader.optional_size("sliding_window")),
        **_ropes(reader),
    )


def _ropes(reader: ConfigReader) -> dict[str, Any]:
    """Layers with and without window have a rope each."""
    given = reader.get("rope_parameters") or {
        FULL: {"rope_theta": 500_000.0},
        WINDOWED: {"rope_theta": 10_000.0},
    }
    positions = reader.size("max_position_embeddings", 131_072)
    full, local = (read_rope(reader, positions, given=given.get(k) or {}) for k in (FULL, WINDOWED))
    if local.scaling:
        reader.refuse("rope_parameters", "windowed layers have a plain rope here", "correct it")
    return {
        "rotary_base": full.base,
        "rope_scaling": full.scaling,
        "window_rotary_base": local.base,
    }


FAMILY = Family(
    name="mellum",
    architectures=("MellumForCausalLM",),
    architecture=architecture,
    rules=partial(moe_decoder, moe_names=QWEN_MOE),
    also_reads=(partial(moe_decoder, moe_names=stacked(QWEN_MOE)),),
)


class MellumPlugin(Plugin):
    """What the entry point names."""

    role: ClassVar[Literal["recipe", "support"]] = "support"
    summary: ClassVar[str] = "Mellum 2, a code model with experts and windows"

    @hookimpl
    def mcore_model_specs(self) -> Iterable[Component[Family]]:
        """Return the family, under its model_type."""
        yield Component("mellum", "mcore_mellum:FAMILY", "Mellum 2")
