"""mimo: MiMo-7B, qwen2 with multi-token prediction layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family, Rule
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.tables import COLUMN, Block, attention, dense_decoder, dense_mlp, norm, plain
from mcore_core.model.transforms import Rows, Run


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a MiMoConfig."""
    reader = ConfigReader(config, "mimo")
    reader.only("attention_bias", True, "q, k and v have biases here")
    return llama_like(
        reader,
        add_qkv_bias=True,
        mtp_layers=reader.count("num_nextn_predict_layers"),
        **reader.windows(reader.size("num_hidden_layers"), max_window_layers=28),
    )


def rules(a: Architecture) -> list[Rule]:
    """Return the table; the projection of a prediction layer takes its two halves in turn."""
    out = dense_decoder(a)
    for i in range(a.mtp_layers):
        outer = Block(f"model.mtp_layers.{i}.", f"mtp.layers.{i}.")
        inner = Block(outer.hf, outer.mcore + "transformer_layer.")
        out += norm(a, outer, "token_layernorm", "enorm")
        out += norm(a, outer, "hidden_layernorm", "hnorm")
        shape = (a.hidden_size, 2 * a.hidden_size)
        project = plain(outer, "input_proj.weight", "eh_proj.weight", shape, COLUMN)
        halves = (Run(0, a.hidden_size, a.hidden_size), Run(0, 0, a.hidden_size))
        out.append(replace(project, transform=Rows(runs=halves, dim=1)))
        out += [*attention(a, inner), *dense_mlp(a, inner)]
        out += norm(a, outer, "final_layernorm", "final_layernorm")
    return out


FAMILY = Family(
    name="mimo",
    architectures=("MiMoForCausalLM",),
    architecture=architecture,
    rules=rules,
    notes=("transformers has no class for it: the trunk is proven as qwen2",),
)
