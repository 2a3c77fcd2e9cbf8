"""Canonical parameter names: layers as the HF model counts them, the same for every layout.

`decoder.layers.{l}` holds attention and MLP of HF layer l, whatever positions they take in the
hybrid pattern, on which pipeline chunk, and whether a norm is fused into the linear after it.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core import parallel_state
from torch import Tensor

from mcore_core.model.config import SUBLAYERS

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.*)$")
_PREDICTION = re.compile(r"^(mtp\.layers\.\d+\.)mtp_model_layer\.layers\.\d+\.(.*)$")
_EXPERTS = re.compile(r"^(.*\.mlp\.experts\.)(linear_fc[12]\.(?:weight|bias|adapter\.\w+))$")
_FUSED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_ADAPTER = ".adapter."
EMBEDDING = "embedding.word_embeddings.weight"


def unwrap(chunk: Any) -> Any:  # noqa: ANN401
    """Return the Decoder inside DDP and precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def canonical(name: str, first_layer: int) -> str:
    """Return the canonical name of a parameter of a chunk whose first HF layer is given."""
    if (found := _PREDICTION.match(name)) is not None:
        return f"{found[1]}transformer_layer.{_unfused(found[2])}"
    if (found := _LAYER.match(name)) is None:
        return name
    return f"decoder.layers.{first_layer + int(found[1]) // SUBLAYERS}.{_unfused(found[2])}"


def _unfused(rest: str) -> str:
    for fused, plain in _FUSED.items():
        if rest.startswith(fused):
            return plain + rest.removeprefix(fused)
    return rest


def named_weights(chunks: Sequence[Any]) -> dict[str, Tensor]:
    """Return this rank's weights by canonical name: parameters, or views of their memory.

    Experts lie in one parameter for all of a rank: each has a view of its own, under its number
    among all experts. The router's `expert_bias` is a buffer, and is there too.

    With tied embeddings the copy that the last pipeline stage holds for its head has the name of
    the embedding: it is the same weight, and must be loaded with the same values.

    What a tuner has added under the name `adapter` is not there: see `named_adapters`.
    """
    return {n: w for n, w in _iterate(chunks) if _ADAPTER not in n}


def named_adapters(chunks: Sequence[Any]) -> dict[str, Tensor]:
    """Return this rank's adapters, named as weights are: `<module>.adapter.<parameter>`."""
    return {n: w for n, w in _iterate(chunks) if _ADAPTER in n}


def _iterate(chunks: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    for wrapped in chunks:
        chunk = unwrap(wrapped)
        for module in chunk.modules():
            # half-precision wrappers cast buffers too; megatron undoes it only in the forward pass
            if hasattr(module, "_maintain_float32_expert_bias"):
                module._maintain_float32_expert_bias()
        buffers = ((n, b) for n, b in chunk.named_buffers() if n.endswith(".expert_bias"))
        for name, weight in (*chunk.named_parameters(), *buffers):
            full = canonical(name, chunk.first_layer)
            if full == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                full = EMBEDDING
            if (found := _EXPERTS.match(full)) is None:
                yield full, weight
                continue
            first = parallel_state.get_expert_model_parallel_rank() * len(weight)
            for expert, view in enumerate(weight.detach().unbind(0), start=first):
                yield f"{found[1]}{expert}.{found[2]}", view
