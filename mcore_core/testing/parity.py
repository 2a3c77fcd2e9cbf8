"""Compare layouts: weights from sharded keys, gradients put together again by sharded key.

A gradient norm hides permutations; a gradient reassembled by its checkpoint key does not. Weights
are drawn from the key and sliced by the shard's offsets, so that every layout starts from the same
model.
"""

import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from mcore_core.checkpoint.state import metadata
from mcore_core.model.names import unwrap

VOCAB_ROWS = 128


def is_vocabulary(key: str) -> bool:
    """Return whether the first dimension of a key's tensor is the (padded) vocabulary."""
    return key in _VOCABULARY


_VOCABULARY = (
    "embedding.word_embeddings.weight",
    "embedding.word_embeddings.adapter.embed_tokens_A",
    "output_layer.weight",
    "output_layer.adapter.lm_head_B",
)


class Part(NamedTuple):
    """One rank's part of a tensor."""

    key: str
    shape: tuple[int, ...]
    slices: tuple[slice | int, ...]
    value: Tensor


def sharded(chunk: Any) -> Iterator[ShardedTensor]:  # noqa: ANN401
    """Yield the sharded tensors of a chunk, factories expanded; `data` is a view of parameters."""
    for value in nested_values(unwrap(chunk).sharded_state_dict(metadata=metadata())):
        yield from _expand(value)


def _expand(value: Any) -> Iterator[ShardedTensor]:  # noqa: ANN401
    if isinstance(value, ShardedTensorFactory):
        built = value.build()
        for inner in nested_values(built if isinstance(built, dict | list) else [built]):
            yield from _expand(inner)
    elif isinstance(value, ShardedTensor) and value.data is not None:
        yield value


def _slices(tensor: ShardedTensor) -> tuple[slice | int, ...]:
    extra = tensor.prepend_axis_num
    fixed: tuple[slice | int, ...] = tuple(int(o) for o in tensor.global_offset[:extra])
    sizes = zip(tensor.global_offset[extra:], tensor.local_shape, strict=True)
    return fixed + tuple(slice(int(o), int(o + n)) for o, n in sizes)


def draw(key: str, shape: Sequence[int], *, scale: float = 0.08) -> Tensor:
    """Return the whole tensor of a key: norms around 1, biases small, everything else normal."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    # vocabularies are padded differently by layout: the common rows must be the same numbers
    rows = -(-shape[0] // VOCAB_ROWS) * VOCAB_ROWS if is_vocabulary(key) else shape[0]
    values = torch.randn((rows, *shape[1:]), generator=generator)[: shape[0]]
    if "norm" in key and key.endswith("weight"):
        return 1 + 0.1 * values
    return (0.02 if key.endswith("bias") else scale) * values


def fill(chunks: Iterable[Any], *, scale: float = 0.08) -> None:
    """Set every parameter to its part of the tensor drawn from its key."""
    drawn: tuple[str, Tensor] | None = None  # the last: a layer's experts are parts of one tensor
    for chunk in chunks:
        for tensor in sharded(chunk):
            if tensor.data.is_floating_point():
                if drawn is None or drawn[0] != tensor.key:
                    drawn = tensor.key, draw(tensor.key, tensor.global_shape, scale=scale)
                whole = drawn[1]
                if _around_zero(chunk, tensor.key):
                    whole = whole - 1
                with torch.no_grad():
                    tensor.data.copy_(whole[_slices(tensor)])


def _around_zero(chunk: Any, key: str) -> bool:  # noqa: ANN401
    """Return whether a key is a norm's weight to which the model adds one."""
    centered = bool(unwrap(chunk).config.layernorm_zero_centered_gamma)
    return centered and "norm" in key and key.endswith("weight") and "out_norm" not in key


def parts(chunks: Iterable[Any], *, gradients: bool = False) -> list[Part]:
    """Return this rank's parts of all weights, or of their accumulated gradients."""
    found = []
    for chunk in chunks:
        pointers = {p.data_ptr(): p for p in unwrap(chunk).parameters() if p.requires_grad}
        for value in nested_values(unwrap(chunk).sharded_state_dict(metadata=metadata())):
            data = getattr(value, "data", None)
            if not isinstance(data, Tensor) or not data.is_floating_point():
                continue
            if gradients:
                if data.data_ptr() not in pointers:
                    continue  # a buffer, or frozen
                data = pointers[data.data_ptr()].main_grad.view_as(data)
            for tensor in _expand(dataclasses.replace(value, data=data)):
                where = _slices(tensor)
                copy = tensor.data.detach().float().clone()
                found.append(Part(tensor.key, tuple(tensor.global_shape), where, copy))
    return found


def assemble(ranks: Iterable[Sequence[Part]]) -> dict[str, Tensor]:
    """Put the parts of all ranks together; replicas must agree.

    Raises:
        AssertionError: Two ranks hold different values of the same part, or a part is missing.
    """
    whole: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for rank in ranks:
        for key, shape, where, value in rank:
            full = whole.setdefault(key, torch.zeros(shape))
            have = seen.setdefault(key, torch.zeros(shape, dtype=torch.bool))
            if bool(have[where].any()):
                worst = float((full[where] - value).abs().max())
                assert worst <= 1e-5 * max(1.0, float(value.abs().max())), (
                    f"replicas of {key} differ by {worst}"
                )
            full[where] = value
            have[where] = True
    gaps = [key for key, have in seen.items() if not bool(have.all())]
    assert not gaps, f"no rank holds all of {gaps}"
    return whole


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest |a - b| / max |b| over keys, and its key.

    Rows that pad a vocabulary in one of them must be zero in gradients: they are compared with 0.
    """
    assert a.keys() == b.keys(), f"keys differ: {sorted(a.keys() ^ b.keys())[:5]}"
    scored = []
    for key in a:
        x, y = a[key], b[key]
        if is_vocabulary(key):
            x, y = _pad_rows(x, len(y)), _pad_rows(y, len(x))
        scored.append((float((x - y).abs().max()) / max(float(y.abs().max()), 1e-12), key))
    return max(scored)


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    return torch.cat((x, x.new_zeros(max(0, rows - len(x)), *x.shape[1:])))
