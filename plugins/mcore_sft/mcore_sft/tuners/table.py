"""A family's table with the names that transformers has in memory, spelled out weight by weight."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mcore_core.model.architecture import Architecture
    from mcore_core.model.family import Family, Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One megatron-core weight of one layer; experts of a layer are one entry."""

    rule: "Rule"
    index: "Mapping[str, int]"
    """Values of the wildcards; the first expert stands for all."""
    hf: tuple[str, ...]
    """Names of the HF tensors, `{e}` where there is one for each expert."""
    weight: str
    """Canonical name of the parameter, without an expert's number."""

    @property
    def experts(self) -> int:
        """How many experts it holds; 0 where it is no expert's."""
        return len(self.rule.over.get("e", ()))

    @property
    def numel(self) -> int:
        """Elements of the whole parameter, not padded."""
        size = max(1, self.experts)
        for length in self.rule.shape:
            size *= length
        return size


def memory_rules(family: "Family", architecture: "Architecture") -> "Sequence[Rule]":
    """Return the table whose names are those of transformers' modules.

    Where checkpoints hold one tensor an expert, the family also reads the stacked ones that
    transformers has in memory.
    """
    rules = family.also_reads[-1] if family.also_reads else family.rules
    return rules(architecture)


def tied_head(table: "Sequence[Entry]") -> Entry:
    """Return what the output layer would be, were it not the embedding: a place for an adapter."""
    embedding = next(e for e in table if e.weight == "embedding.word_embeddings.weight")
    names = ("lm_head.weight",)
    rule = replace(embedding.rule, hf=names, mcore="output_layer.weight", hf_copies=())
    return replace(embedding, rule=replace(rule, hf_twins=()), hf=names, weight=rule.mcore)


def entries(rules: "Sequence[Rule]") -> Iterator[Entry]:
    """Yield every parameter, in the order of the table, layer by layer."""
    found = []
    for number, rule in enumerate(rules):
        others = {k: v for k, v in rule.over.items() if k != "e"}
        for index in _indices(others):
            first = {**index, "e": rule.over["e"][0]} if "e" in rule.over else index
            entry = Entry(
                rule=rule,
                index=first,
                hf=tuple(_fill(n, index) for n in rule.hf),
                weight=_fill(rule.mcore, index).replace(".{e}", ""),
            )
            found.append((_block(number, rule, rules), index.get("l", 0), number, entry))
    yield from (entry for *_, entry in sorted(found, key=lambda x: x[:3]))


def _block(number: int, rule: "Rule", rules: "Sequence[Rule]") -> int:
    """Return the number of the first of the neighbouring rules that have layers, if this has."""
    while "l" in rule.over and number and "l" in rules[number - 1].over:
        number -= 1
    return number


def _indices(over: "Mapping[str, Sequence[int]]") -> "Iterator[dict[str, int]]":
    found: list[dict[str, int]] = [{}]
    for name, values in over.items():
        found = [{**i, name: v} for i in found for v in values]
    yield from found


def _fill(name: str, index: "Mapping[str, int]") -> str:
    for key, value in index.items():
        name = name.replace("{" + key + "}", str(value))
    return name
