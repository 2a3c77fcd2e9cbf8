"""A family's table, spelled out for one architecture, and the check that nothing is left over."""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING

from mcore_core.errors import Problem
from mcore_core.model.family import Ignored
from mcore_hfbridge.hf_files import BYTES, FLOATS, HFFiles, HFTensor
from mcore_hfbridge.predictions import MOST, announced, prediction_layers

if TYPE_CHECKING:
    from pathlib import Path

    from mcore_core.model.architecture import Architecture
    from mcore_core.model.family import Family, Piece, Rule, Shape

_OPTIONS = "fix: check the model options; if they are right, the family is at fault"
SHOWN = 50
"""Problems listed one by one; more are counted."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One megatron-core weight: a rule at one value of its wildcards."""

    name: str
    rule: "Rule"
    index: Mapping[str, int]
    hf: tuple[str, ...]
    """Names of the HF tensors it is made of."""

    def pieces(self, local_shape: "Shape", rank: int, size: int) -> "list[Piece]":
        """Return what `rank` of `size` ranks of the shard's group holds of the HF tensors."""
        rows = local_shape[0] * (size if self.rule.shard.dim == 0 else 1) if self.rule.pad else None
        return self.rule.local_pieces(self.index, rows, rank, size)

    def misfit(self, local_shape: "Shape", size: int) -> str:
        """Return what is wrong with the shape of one rank's part, or an empty string."""
        shape, shard = self.rule.shape, self.rule.shard
        if self.rule.pad:
            rows = local_shape[0] * (size if shard.dim == 0 else 1)
            if rows < shape[0]:
                return f"at least {shape[0]} rows in all, found {rows}"
            shape = (rows, *shape[1:])
        if not shard.divides(shape, size):
            return f"{list(shape)} to be divisible over {size} ranks along axis {shard.dim}"
        expected = shard.local_shape(shape, size)
        if expected != tuple(local_shape):
            return f"{list(expected)}, found {list(local_shape)}"
        return ""


@dataclass(slots=True)
class HFPart:
    """One HF tensor, and the weights that hold its boxes."""

    name: str
    shape: "Shape"
    held_by: list[tuple[str, int]] = field(default_factory=list)
    """(weight, position among that weight's HF tensors)."""
    copies: tuple[str, ...] = ()
    optional: bool = False
    """A checkpoint may lack it."""


class Plan:
    """Every weight and every HF tensor of a model, each derived from the other by pieces."""

    def __init__(
        self,
        family: "Family",
        architecture: "Architecture",
        rules: "Sequence[Rule] | None" = None,
    ) -> None:
        self.family = family
        self.weights: dict[str, Weight] = {}
        self.hf: dict[str, HFPart] = {}
        """In the order of export: layer by layer."""
        self.reads_only = rules is not None
        self._architecture = architecture
        rules = family.rules(architecture) if rules is None else rules
        # Neighbouring rules of layers are spelled out together, one layer after another.
        for layered, run in groupby(rules, key=lambda rule: "l" in rule.over):
            weights = [weight for rule in run for weight in _instances(rule)]
            if layered:
                weights.sort(key=lambda weight: weight.index["l"])
            for weight in weights:
                self._add(weight)
        self._check_table()

    def _add(self, weight: Weight) -> None:
        if weight.name in self.weights:
            raise ValueError(f"family {self.family.name}: two rules for {weight.name!r}")
        self.weights[weight.name] = weight
        for i, (name, shape) in enumerate(zip(weight.hf, weight.rule.shapes, strict=True)):
            for spelled in (name, *weight.rule.hf_twins):
                part = self.hf.setdefault(spelled, HFPart(spelled, shape, [], ()))
                part.held_by.append((weight.name, i))
            self.hf[name].copies = weight.rule.hf_copies
            self.hf[name].optional = weight.rule.optional

    def _check_table(self) -> None:
        """Raise ValueError where the table itself loses elements: a mistake of its author."""
        sizes = dict.fromkeys(self.hf, 0)
        for weight in self.weights.values():
            for piece in weight.pieces(weight.rule.shape, 0, 1):
                sizes[weight.hf[piece.hf]] += piece.numel
        twins = {twin for weight in self.weights.values() for twin in weight.rule.hf_twins}
        for name, part in self.hf.items():
            if name not in twins and sizes[name] != prod(part.shape):
                raise ValueError(
                    f"family {self.family.name}: the rules of {name!r} move {sizes[name]} of its "
                    f"{prod(part.shape)} elements"
                )

    def check_files(self, files: HFFiles) -> list[Problem]:
        """Return every tensor that is missing, left over, or of another shape or kind."""
        problems = [
            Problem(
                "MC530",
                f"{files.folder} lacks the tensor {name!r}: expected {list(part.shape)}, found "
                "nothing",
                [f"{part.held_by[0][0]} is made of it", _complete(part, self.family.mtp_key)],
            )
            for name, part in self.hf.items()
            if name not in files.tensors and not part.optional
        ]
        ignored = self.ignored_in(files.folder)
        allowed = self.hf | {c: p for p in self.hf.values() for c in p.copies}
        for name, tensor in files.tensors.items():
            if _matches(ignored, name) or name in files.scales:
                continue
            if found := self._misfit(tensor, allowed.get(name)):
                code, why, fix = found
                where = files.folder / tensor.file
                problems.append(Problem(code, f"{where}: {name!r} {why}", [f"fix: {fix}"]))
        return problems

    @cached_property
    def ignored(self) -> "tuple[Ignored, ...]":
        """What is left out on purpose: by the family, or since this model has no such part."""
        return (*self.family.ignored, *_left_out(self.family, self._architecture))

    def ignored_in(self, folder: "Path") -> "tuple[Ignored, ...]":
        """Return what is left out of a folder: also prediction layers that the run does without."""
        if self._architecture.head != "lm":
            return self.ignored
        depths = range(self._architecture.mtp_layers, announced(self.family, folder))
        why = "a layer of multi-token prediction beyond --mtp_num_layers"
        return (*self.ignored, *prediction_layers(self.family, self._architecture, depths, why))

    def is_ignored(self, name: str) -> bool:
        """Return whether a tensor is left out on purpose, of any folder."""
        return _matches(self.ignored, name)

    @cached_property
    def _unannounced(self) -> "list[Ignored]":
        """What the first prediction layer would have, where config.json tells of none."""
        if self._architecture.head != "lm" or self._architecture.mtp_layers:
            return []
        return prediction_layers(self.family, self._architecture, range(1), "")

    def missing(self, files: HFFiles) -> int:
        """Return how many of the table's tensors are not in the files."""
        return sum(n not in files.tensors and not p.optional for n, p in self.hf.items())

    def _misfit(self, tensor: HFTensor, part: HFPart | None) -> tuple[str, str, str] | None:
        """Return code, reason and fix where a tensor of a file is not as the table has it."""
        belong = "check that config.json and the model options belong to these weights"
        if part is None:
            why = f"has no place in family {self.family.name!r}: expected no such tensor, found "
            key = self.family.mtp_key
            predicts = f"set {key} to 1 in config.json: it is of a layer of multi-token prediction"
            fix = predicts if _matches(self._unannounced, tensor.name) else belong
            return "MC531", why + f"{list(tensor.shape)}", fix
        if tensor.shape != part.shape:
            why = f"has another shape: expected {list(part.shape)}, found {list(tensor.shape)}"
            return "MC532", why, belong
        if tensor.dtype not in FLOATS and not tensor.scale:
            why = f"has another type: expected {', '.join(FLOATS)}, found {tensor.dtype}"
            if tensor.dtype in BYTES:
                why += f" without {tensor.name}_scale_inv"
            return "MC535", why, "use the original, unquantized weights"
        return None

    def check_shape(self, name: str, shape: "Shape", sizes: Mapping[str, int]) -> Problem | None:
        """Return what is wrong with one rank's part of a weight, given the sizes of groups."""
        weight = self.weights.get(name)
        why = (
            weight.misfit(shape, sizes[weight.rule.shard.group])
            if weight
            else f"no such weight, found {list(shape)}"
        )
        if not why:
            return None
        return Problem(
            "MC533",
            f"the model's weight {name!r} does not fit family {self.family.name!r}: expected {why}",
            [_OPTIONS],
        )

    def check_complete(self, held: Set[str]) -> list[Problem]:
        """Return every weight of the table that no rank holds."""
        return [
            Problem(
                "MC533",
                f"the model has no weight {name!r}: expected {list(weight.rule.shape)} from "
                f"{', '.join(weight.hf)}, found nothing",
                [_OPTIONS],
            )
            for name, weight in self.weights.items()
            if name not in held
        ]


def shorten(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems, the same one once, with the tail counted where they are too many."""
    unique = list({str(p): p for p in problems}.values())
    if len(unique) <= SHOWN:
        return unique
    rest = Problem("MC530", f"and {len(unique) - SHOWN} more problems like these")
    return [*unique[:SHOWN], rest]


def _matches(ignored: "Sequence[Ignored]", name: str) -> bool:
    return any(re.fullmatch(i.pattern, name) for i in ignored)


def _complete(part: HFPart, key: str) -> str:
    predicts = any(name.startswith("mtp.") for name, _ in part.held_by)
    without = f", or set {key} to 0 in config.json to go without"
    return "fix: use a complete checkpoint" + (without if predicts else "")


def _left_out(family: "Family", architecture: "Architecture") -> list[Ignored]:
    """Return what a language model's checkpoint has that a model with another head has not."""
    if architecture.head == "lm":
        return []
    head = Ignored(r"lm_head\..*", "the output layer: this model does not predict tokens")
    why = "a layer of multi-token prediction: this model has none"
    return [head, *prediction_layers(family, architecture, range(MOST), why)]


def _instances(rule: "Rule") -> list[Weight]:
    return [Weight(name, rule, index, hf) for index, hf, name in rule.expand()]
