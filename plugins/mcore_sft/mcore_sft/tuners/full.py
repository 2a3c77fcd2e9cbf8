"""The `full` tuner: the model's own weights train, but for those that options freeze."""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mcore_core.config.tuner import FullTunerConfig
from mcore_core.errors import Problem, UsageError, usage_error
from mcore_core.model.names import unwrap
from mcore_core.train.tuning import AllWeights
from mcore_sft.tuners.parameters import keep_bias_gradients, needs_gradient, parameters_of
from mcore_sft.tuners.table import Entry, entries

if TYPE_CHECKING:
    from mcore_core.protocols import ModelChunk, TunerContext

type Test = Callable[[str], bool]


class Full(AllWeights):
    """All weights, or those that are not frozen."""

    def __init__(self, context: "TunerContext") -> None:
        """Find what is frozen. Raises UsageError where a name is of nothing, or of a part."""
        super().__init__(context)
        self.table = list(entries(context.family.rules(context.architecture)))
        self.frozen = frozen(context.config[FullTunerConfig], self.table)

    def apply(self, chunks: "Sequence[ModelChunk]") -> None:
        """Freeze what the options name."""
        if not self.frozen:
            return
        for entry, parameter in parameters_of(chunks, self.table):
            parameter.requires_grad_(entry.weight not in self.frozen)
        for wrapped in chunks:
            chunk = unwrap(wrapped)
            if hasattr(chunk, "embedding"):
                chunk.embedding.register_forward_hook(needs_gradient)
        keep_bias_gradients(chunks)

    def identity(self) -> dict[str, Any]:
        """Return what two runs must share for one to go on from the other's checkpoint."""
        return {"tuner_type": "full", **({"frozen": sorted(self.frozen)} if self.frozen else {})}


def frozen(options: FullTunerConfig, table: "Sequence[Entry]") -> set[str]:
    """Return the canonical names of the parameters that do not train.

    Names in the options are Hugging Face's. First the ratio, then what freezes, then what trains.

    Raises:
        UsageError: A name is of nothing, a parameter would be frozen in part, or all of it.
    """
    found = _lowest(options.freeze_parameters_ratio, table)
    problems: list[Problem] = []
    for name, tests, freezes in (
        ("freeze_parameters", _starts(options.freeze_parameters), True),
        ("freeze_parameters_regex", _finds(options.freeze_parameters_regex), True),
        ("trainable_parameters", _starts(options.trainable_parameters), False),
        ("trainable_parameters_regex", _finds(options.trainable_parameters_regex), False),
    ):
        for text, test in tests:
            mine, wrong = _named(f"--{name} {text}", test, table)
            problems += wrong
            found = found | mine if freezes else found - mine
    if problems:
        raise UsageError(problems)
    if len(found) == len(table):
        raise usage_error(
            "MC559",
            "the options freeze every parameter of the model",
            "fix: lower --freeze_parameters_ratio, or name parts with --trainable_parameters",
        )
    return found


def _lowest(ratio: float, table: "Sequence[Entry]") -> set[str]:
    """Return the parameters from the embedding upwards that hold `ratio` of all elements."""
    ends = list(accumulate(entry.numel for entry in table))
    return {entry.weight for entry in table[: bisect_right(ends, int(ends[-1] * ratio))]}


def _starts(prefixes: Sequence[str]) -> list[tuple[str, Test]]:
    def test(prefix: str) -> Test:
        return lambda name: name.startswith(prefix)

    return [(prefix, test(prefix)) for prefix in prefixes]


def _finds(pattern: str | None) -> list[tuple[str, Test]]:
    if pattern is None:
        return []
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise usage_error(
            "MC559", f"{pattern} is not a regular expression: {error}", "fix: correct it"
        ) from error
    return [(pattern, lambda name: compiled.search(name) is not None)]


def _named(option: str, test: Test, table: "Sequence[Entry]") -> tuple[set[str], list[Problem]]:
    """Return the parameters whose HF tensors pass, and those of which only some do."""
    found: set[str] = set()
    for entry in table:
        numbers = entry.rule.over.get("e", (0,))
        names = [n.replace("{e}", str(e)) for n in entry.hf for e in numbers]
        passed = [n for n in names if test(n)]
        if not passed:
            continue
        if len(set(passed)) < len(set(names)):
            others = [n for n in dict.fromkeys(names) if n not in passed]
            rest = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            problem = Problem(
                "MC559",
                f"{option}: {passed[0]} lies in one parameter with {rest}",
                ["fix: name them all, or none of them"],
            )
            return found, [problem]
        found.add(entry.weight)
    if not found:
        known = ", ".join(entry.hf[0] for entry in table[:3])
        problem = Problem(
            "MC559",
            f"{option}: the model has no such parameter",
            [f"its parameters are {known}, ..."],
        )
        return found, [problem]
    return found, []
