"""A chunk's parameters by the HF tensors that they hold."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from mcore_core.model.names import EMBEDDING, canonical, unwrap

if TYPE_CHECKING:
    from mcore_sft.tuners.table import Entry


def parameters_of(
    chunks: Sequence[Any], table: "Sequence[Entry]"
) -> "Iterator[tuple[Entry, torch.nn.Parameter]]":
    """Yield every parameter of this rank with what it is; those that no table has are left out.

    The copy of a tied embedding on the last pipeline stage is the embedding.
    """
    known = {entry.weight: entry for entry in table}
    for wrapped in chunks:
        chunk = unwrap(wrapped)
        tied = chunk.share_embeddings_and_output_weights
        for name, parameter in chunk.named_parameters():
            full = canonical(name, chunk.first_layer)
            if tied and full == "output_layer.weight":
                full = EMBEDDING
            if full in known:
                yield known[full], parameter


def keep_bias_gradients(chunks: Sequence[Any]) -> None:
    """Let biases train whose weight does not: megatron's product of a frozen weight ignores them.

    The bias, which is in the output already, is added once more as zero with a gradient.
    """
    for wrapped in chunks:
        for module in unwrap(wrapped).modules():
            bias = getattr(module, "bias", None)
            inside = isinstance(module, ColumnParallelLinear) and not module.skip_bias_add
            if inside and bias is not None and bias.requires_grad and _is_frozen(module):
                module.register_forward_hook(_with_bias_gradient)


def _is_frozen(module: Any) -> bool:  # noqa: ANN401
    return module.weight is not None and not module.weight.requires_grad


def _with_bias_gradient(module: Any, _: Any, out: tuple[Tensor, Any]) -> tuple[Tensor, Any]:  # noqa: ANN401
    return out[0] + (module.bias - module.bias.detach()), out[1]


def needs_gradient(_: torch.nn.Module, args: Any, out: Tensor) -> Tensor:  # noqa: ANN401
    """Let recomputed layers and pipeline stages see that something above the embedding trains."""
    if torch.is_grad_enabled() and not out.requires_grad:
        out.requires_grad_()
    return out
