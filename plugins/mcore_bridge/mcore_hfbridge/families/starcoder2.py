"""starcoder2: LayerNorm, biases everywhere, an MLP without gate."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.tables import Names, dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Starcoder2Config."""
    reader = ConfigReader(
        config,
        "starcoder2",
        {
            "num_key_value_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "norm_epsilon": 1e-5,
            "initializer_range": 0.018042,
            "tie_word_embeddings": True,
        },
    )
    bias = reader.flag("use_bias", default=True)
    dropout = reader.number("residual_dropout", 0.0)
    if reader.number("embedding_dropout", 0.0) != dropout:
        why = "dropout is the same on embeddings and on the residual stream here"
        reader.refuse("embedding_dropout", why, "make it equal to residual_dropout")
    return llama_like(
        reader,
        eps="norm_epsilon",
        normalization="LayerNorm",
        gated=False,
        add_qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        hidden_dropout=dropout,
        **reader.window_everywhere(reader.optional_size("sliding_window")),
    )


NAMES = Names(up="c_fc", down="c_proj")


FAMILY = Family(
    name="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    architecture=architecture,
    rules=partial(dense_decoder, names=NAMES),
)
