"""Bytes that a rank really keeps: weights, gradients, optimizer state, and saved activations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mcore_core.model.names import unwrap


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes of a rank."""

    parameters: int
    """Elements, not bytes."""
    weights: int
    gradients: int
    optimizer: int


def _storages(tensors: Iterator[Tensor] | Sequence[Tensor]) -> dict[int, int]:
    """Return the bytes of each piece of memory that tensors lie in, by its address."""
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.untyped_storage().nbytes()
    }


def measure(chunks: Sequence[Any], optimizer: Any) -> Measured:  # noqa: ANN401
    """Return what DDP-wrapped chunks and their optimizer keep, after at least one step."""
    parameters = [p for chunk in chunks for p in unwrap(chunk).parameters()]
    weights = _storages(parameters)
    buffers = [b for c in chunks for b in (*c.buffers, *getattr(c, "expert_parallel_buffers", ()))]
    gradients = _storages([b.grad_data for b in buffers])
    kept: list[Tensor] = []
    for inner in _inner(optimizer):
        for state in inner.state.values():
            kept += [v for v in state.values() if isinstance(v, Tensor) and v.dim()]
        kept += [p for group in inner.param_groups for p in group["params"]]
    state = {k: n for k, n in _storages(kept).items() if k not in weights and k not in gradients}
    return Measured(
        parameters=sum(p.numel() for p in parameters),
        weights=sum(weights.values()),
        gradients=sum(gradients.values()),
        optimizer=sum(state.values()),
    )


def _inner(optimizer: Any) -> Iterator[torch.optim.Optimizer]:  # noqa: ANN401
    """Yield torch's optimizers inside megatron's."""
    for each in getattr(optimizer, "chained_optimizers", None) or [optimizer]:
        inner = getattr(each, "optimizer", None)
        if isinstance(inner, torch.optim.Optimizer):
            yield inner
        elif inner is not None:
            yield from _inner(inner)


@dataclass(slots=True)
class Saved:
    """What autograd keeps for the backward pass, filled while `saved_activations` is open."""

    storages: dict[int, int] = field(default_factory=dict)
    keep: list[Tensor] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes, each piece of memory counted once."""
        return sum(self.storages.values())


@contextmanager
def saved_activations(chunks: Sequence[Any]) -> Iterator[Saved]:
    """Record the memory of tensors that a forward pass saves, parameters left out."""
    saved = Saved()
    weights = _storages([p for chunk in chunks for p in unwrap(chunk).parameters()])

    def pack(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights and not isinstance(tensor, torch.nn.Parameter):
            saved.storages[memory.data_ptr()] = memory.nbytes()
            saved.keep.append(tensor)  # else its address would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
