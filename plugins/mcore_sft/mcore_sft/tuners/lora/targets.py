"""Which projections get an adapter: names as Hugging Face and as megatron-core have them."""

import re
from typing import TYPE_CHECKING

from mcore_core.errors import Problem, UsageError, did_you_mean, usage_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcore_sft.tuners.lora.spec import LoraSpec
    from mcore_sft.tuners.lora.split import Projection

ALL_LINEAR, ALL_ROUTER = "all-linear", "all-router"


def select(spec: "LoraSpec", found: "Sequence[Projection]") -> "list[Projection]":
    """Return the projections that the spec names.

    Raises:
        UsageError: A target names nothing; the message lists what there is.
    """
    if spec.regex is not None:
        return _by_regex(spec.regex, found)
    chosen: set[str] = set()
    problems = []
    for target in spec.targets:
        names = {p.name for p in found if _is(target, p)}
        if not names:
            problems.append(_unknown(target, "target_modules", found))
        chosen |= names
    for target in spec.parameters:
        names = {p.name for p in found if ends(p.tensor, target)}
        if not names:
            problems.append(_unknown(target, "target_parameters", found))
        chosen |= names
    if problems:
        raise UsageError(problems)
    return [p for p in found if p.name in chosen]


def ends(name: str, target: str) -> bool:
    """Return whether a dotted name is the target or ends in it, as PEFT compares."""
    return name == target or name.endswith("." + target)


def _is(target: str, p: "Projection") -> bool:
    if target == ALL_ROUTER:
        return p.kind == "router"
    if target == ALL_LINEAR:
        return p.kind in ("linear", "experts") and p.module != "output_layer"
    return ends(p.name, target) or ends(p.module, target)


def _by_regex(regex: str, found: "Sequence[Projection]") -> "list[Projection]":
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise usage_error(
            "MC554",
            f"--target_regex {regex} is not a regular expression: {error}",
            "fix: for example .*[.]q_proj",
        ) from error
    chosen = [p for p in found if pattern.fullmatch(p.name) or pattern.fullmatch(p.module)]
    if not chosen:
        raise UsageError([_unknown(regex, "target_regex", found)])
    return chosen


def _unknown(target: str, option: str, found: "Sequence[Projection]") -> Problem:
    leaves = dict.fromkeys(p.leaf for p in found)
    modules = dict.fromkeys(p.module.rpartition(".")[2] for p in found)
    hint = did_you_mean(target.rpartition(".")[2], [*leaves, *modules])
    notes = [
        f"Hugging Face names: {', '.join(leaves)}",
        f"megatron-core names: {', '.join(modules)}",
        f"or: {ALL_LINEAR}, {ALL_ROUTER}",
    ]
    what = f"--{option}: the model has no module {target!r} that can have an adapter"
    return Problem("MC554", what, [*notes, *([hint] if hint else [])])
