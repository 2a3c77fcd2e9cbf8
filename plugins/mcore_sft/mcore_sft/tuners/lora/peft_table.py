"""How PEFT names and stores adapters, as a table from its tensors to ours.

PEFT reaches the experts that transformers stacks in one parameter by `target_parameters`: A is
[experts * rank, inputs], expert by expert, and B [outputs, rank * experts], whose columns are
numbered rank by rank. Where two parameters of one module are adapted, it wraps the module once for
each, the first parameter innermost.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mcore_core.model.family import Piece, Rule, Shape, Shard, Transform
from mcore_core.model.transforms import Rows

if TYPE_CHECKING:
    from mcore_sft.tuners.lora.split import Projection
    from mcore_sft.tuners.table import Entry

PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class StackedA:
    """One expert's A, [rank, inputs], in that of all."""

    rank: int

    def shape(self, shapes: Sequence[Shape], /) -> Shape:
        """Return the shape of one expert's."""
        return (self.rank, shapes[0][1])

    def pieces(self, shapes: Sequence[Shape], index: Mapping[str, int], /) -> list[Piece]:
        """Return the expert's rows."""
        at = (index["e"] * self.rank, 0)
        return [Piece(hf=0, at=at, to=(0, 0), size=self.shape(shapes), axes=(0, 1))]


@dataclass(frozen=True, slots=True)
class StackedB:
    """One expert's B, [outputs, rank], in that of all."""

    experts: int

    def shape(self, shapes: Sequence[Shape], /) -> Shape:
        """Return the shape of one expert's."""
        return (shapes[0][0], shapes[0][1] // self.experts)

    def pieces(self, shapes: Sequence[Shape], index: Mapping[str, int], /) -> list[Piece]:
        """Return the expert's columns, one for each rank."""
        return [
            Piece(
                hf=0,
                at=(0, index["e"]),
                to=(0, 0),
                size=self.shape(shapes),
                axes=(0, 1),
                steps=(1, self.experts),
            )
        ]


def tensor_names(p: "Projection", chosen: "Sequence[Projection]") -> tuple[str, str]:
    """Return the names of a projection's A and B in PEFT's file.

    Args:
        p: The projection.
        chosen: All that have an adapter.
    """
    path = p.name
    if p.experts:
        container = p.name.rpartition(".")[0]
        leaves = [q.leaf for q in chosen if q.name.rpartition(".")[0] == container]
        path = container + ".base_layer" * (len(leaves) - 1 - leaves.index(p.leaf))
    if p.kind == "embedding":
        return f"{PREFIX}{path}.lora_embedding_A", f"{PREFIX}{path}.lora_embedding_B"
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def adapter_rules(
    chosen: "Sequence[Projection]", ranks: Mapping[str, int], sizes: Mapping[str, int]
) -> list[Rule]:
    """Return the table of all adapters.

    Args:
        chosen: The projections that have one.
        ranks: The rank of each, by the projection's name.
        sizes: Sizes of the groups "tp" and "etp".
    """
    rules: list[Rule] = []
    for p in chosen:
        names = tensor_names(p, chosen)
        rules += _rules_of(p, names, ranks[p.name], sizes[p.group])
    return rules


def _rules_of(p: "Projection", names: tuple[str, str], rank: int, size: int) -> list[Rule]:
    where = p.module
    over: dict[str, range] = {}
    a_shape, b_shape = (rank, p.inputs), (p.outputs, rank)
    a_transform: Transform = Rows()
    b_transform: Transform = Rows()
    a_shard, b_shard, a_pad, b_pad = p.shard_of_a(), p.shard_of_b(size), False, p.entry.rule.pad
    if p.experts:
        where = where.replace(".experts.", ".experts.{e}.")
        over = {"e": range(p.experts)}
        a_shape, b_shape = (rank * p.experts, p.inputs), (p.outputs, rank * p.experts)
        a_transform, b_transform = StackedA(rank), StackedB(p.experts)
    if p.kind == "embedding":
        # A is along the vocabulary, and held as the embedding's own weight is
        a_shape, b_shape = (rank, p.outputs), (p.inputs, rank)
        a_transform, a_shard, a_pad = Rows(transpose=True), Shard(dim=0), p.entry.rule.pad
        b_shard, b_pad = Shard(), False
    found = []
    for letter, name, shape, transform, shard, pad in (
        ("A", names[0], a_shape, a_transform, a_shard, a_pad),
        ("B", names[1], b_shape, b_transform, b_shard, b_pad),
    ):
        found.append(
            Rule(
                hf=(name,),
                shapes=(shape,),
                mcore=f"{where}.adapter.{p.leaf}_{letter}",
                transform=transform,
                shard=shard,
                over=over,
                pad=pad,
            )
        )
    return found


def weight_rules(saved: "Sequence[Entry]", chosen: "Sequence[Projection]") -> list[Rule]:
    """Return the table of the model's own parameters that train beside the adapters.

    PEFT keeps the bias of an adapted layer below the layer that it wraps.
    """
    wrappers = Counter(p.name.rpartition(".")[0] if p.experts else p.name for p in chosen)

    def spelled(name: str) -> str:
        module, _, last = name.rpartition(".")
        return f"{PREFIX}{module}{'.base_layer' * wrappers[module]}.{last}"

    rules = []
    for entry in saved:
        over = {"e": entry.rule.over["e"]} if entry.experts else {}
        weight = entry.weight
        if entry.experts:
            weight = weight.replace(".experts.", ".experts.{e}.")
        names = tuple(spelled(n) for n in entry.hf)
        fixed = replace(entry.rule, hf=names, mcore=weight, over=over, hf_copies=(), hf_twins=())
        rules.append(fixed)
    return rules
