"""The model's weights with the adapters added: computed out of place, one at a time."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mcore_sft.tuners.lora.layers import Adapter
    from mcore_sft.tuners.lora.matrices import Pair

KEPT = 8
"""Weights that are kept: a fused one is asked for once for each HF tensor in it."""


class Merged(Mapping[str, Tensor]):
    """This rank's weights by canonical name; a merged one is computed when it is asked for.

    Args:
        weights: The model's own.
        adapters: Those of this rank's chunks.
    """

    def __init__(self, weights: Mapping[str, Tensor], adapters: "Sequence[Adapter]") -> None:
        self._weights = weights
        self._changes: dict[str, list[tuple[Pair, int | None]]] = {}
        self._recent: OrderedDict[str, Tensor] = OrderedDict()
        for adapter in adapters:
            for pair in adapter.pairs:
                for name, expert in _weights_of(pair):
                    self._changes.setdefault(name, []).append((pair, expert))

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        if name not in self._changes:
            return weight
        if name not in self._recent:
            self._recent[name] = self._merge(weight, self._changes[name])
            while len(self._recent) > KEPT:
                self._recent.popitem(last=False)
        return self._recent[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    @torch.no_grad()
    def _merge(self, weight: Tensor, changes: "list[tuple[Pair, int | None]]") -> Tensor:
        """Return W + scale B A in float32, rounded once."""
        whole = weight.detach().to(torch.float32, copy=True)
        for pair, expert in changes:
            add(whole, pair, expert)
        return whole.to(weight.dtype)


def add(whole: Tensor, pair: "Pair", expert: int | None) -> None:
    """Add what one projection changes to a rank's weight, in place.

    Args:
        whole: [outputs, inputs] of the rank.
        pair: The projection's matrices.
        expert: Which of the rank's experts the weight is of.
    """
    a, b = (x.float() if expert is None else x[expert].float() for x in (pair.a, pair.b))
    projection, place = pair.projection, pair.place
    if projection.kind == "embedding":
        whole += pair.scale * (a @ b.t())
    elif projection.entry.rule.pad:
        whole += pair.scale * (b @ a)
    else:
        held = projection.rows(place.rank, place.size)
        if not projection.is_even(place.size):
            b = b[torch.tensor([hf for hf, _ in held], dtype=torch.long, device=b.device)]
        rows = torch.tensor([row for _, row in held], dtype=torch.long, device=whole.device)
        whole.index_add_(0, rows, pair.scale * (b @ a))


def _weights_of(pair: "Pair") -> Iterator[tuple[str, int | None]]:
    """Yield the canonical names of the weights that a pair changes, and which expert each is."""
    weight, place = pair.projection.entry.weight, pair.place
    if not place.experts:
        yield weight, None
        return
    for expert in range(place.experts):
        name = weight.replace(".experts.", f".experts.{place.first_expert + expert}.")
        yield name, expert
