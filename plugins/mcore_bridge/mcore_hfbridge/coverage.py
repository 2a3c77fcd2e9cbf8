"""Which tensors of a folder are claimed by which rule, from headers alone."""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mcore_hfbridge.hf_files import HFFiles
from mcore_hfbridge.load import choose
from mcore_hfbridge.plan import shorten

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mcore_core.errors import Problem
    from mcore_core.model.family import Rule
    from mcore_hfbridge.plan import Plan


@dataclass(slots=True)
class Claim:
    """One rule and the tensors that it claims."""

    hf: tuple[str, ...]
    mcore: str
    shape: tuple[int, ...]
    """Of one whole megatron-core weight."""
    split: str
    """How ranks divide it, in words."""
    tensors: list[str] = field(default_factory=list)
    """Those that the folder holds."""
    expected: int = 0


@dataclass(frozen=True, slots=True)
class Coverage:
    """Every tensor of a folder, accounted for."""

    family: str
    claims: "list[Claim]"
    ignored: dict[str, str]
    """Tensors left out on purpose, and why."""
    problems: "list[Problem]"
    """Tensors that are missing, unclaimed or of another shape."""


def coverage(plans: "Sequence[Plan]", folder: "Path") -> Coverage:
    """Return what the family's table says of every tensor. Reads headers only."""
    files = HFFiles.scan(folder)
    plan = choose(plans, files)
    claims: dict[int, Claim] = {}
    seen: set[str] = set()
    for weight in plan.weights.values():
        rule = weight.rule
        claim = claims.setdefault(
            id(rule), Claim((*rule.hf, *rule.hf_twins), rule.mcore, rule.shape, _split(rule))
        )
        for name in (*weight.hf, *rule.hf_twins, *rule.hf_copies):
            if name in seen:
                continue
            seen.add(name)
            claim.expected += name not in rule.hf_copies and not rule.optional
            if name in files.tensors:
                claim.tensors.append(name)
    reasons = {i.pattern: i.reason for i in plan.ignored_in(folder)}
    ignored = {
        name: reason
        for name in files.tensors
        for pattern, reason in reasons.items()
        if re.fullmatch(pattern, name)
    }
    ignored |= dict.fromkeys(files.scales, "part of an fp8 or mxfp4 weight, read with it")
    problems = shorten(plan.check_files(files))
    return Coverage(plan.family.name, list(claims.values()), ignored, problems)


def _split(rule: "Rule") -> str:
    shard = rule.shard
    each = ", experts over ep" if "e" in rule.over else ""
    if shard.dim is None:
        return "whole on every rank" + each
    blocks = len(shard.sections) or shard.blocks
    parts = f", {blocks} blocks" if blocks > 1 else ""
    return f"axis {shard.dim} over {shard.group}{parts}" + each
