"""phi3: Phi-3 and Phi-4-mini, with q, k, v in one tensor and gate, up in another."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.tables import Names, dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Phi3Config."""
    reader = ConfigReader(
        config, "phi3", {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}
    )
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) in ("su", "yarn"):
        rest = {k: v for k, v in scaling.items() if k != "type"}
        reader.config = {**config, "rope_scaling": {**rest, "rope_type": "longrope"}}
    for key in ("resid_pdrop", "embd_pdrop"):
        reader.only(key, 0.0, "dropout on the residual stream is not built in")
    window = reader.window_everywhere(reader.optional_size("sliding_window"))
    return llama_like(reader, partial=1.0, **window)


FUSED = Names(qkv="self_attn.qkv_proj", gate_up="gate_up_proj")


FAMILY = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    architecture=architecture,
    rules=partial(dense_decoder, names=FUSED),
)
