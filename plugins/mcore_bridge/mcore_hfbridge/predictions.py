"""Multi-token prediction layers that a checkpoint has and a model is built without."""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from os.path import commonprefix
from typing import TYPE_CHECKING

from mcore_core.model.family import Ignored

if TYPE_CHECKING:
    from pathlib import Path

    from mcore_core.model.architecture import Architecture
    from mcore_core.model.family import Family

MOST = 4
"""No checkpoint has more of these layers."""


def announced(family: "Family", folder: "Path") -> int:
    """Return how many prediction layers a folder's config.json tells of; 0 where it is silent."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever needs the file says what is wrong with it
        return 0
    found = config.get(family.mtp_key) if isinstance(config, dict) else None
    return min(found, MOST) if isinstance(found, int) else 0


def prediction_layers(
    family: "Family", architecture: "Architecture", depths: Iterable[int], why: str
) -> list[Ignored]:
    """Return what matches every tensor of these prediction layers, counted from 0."""
    found = []
    for i in depths:
        rules = family.rules(replace(architecture, head="lm", mtp_layers=i + 1))
        names = [n for r in rules if r.mcore.startswith(f"mtp.layers.{i}.") for n in r.hf]
        prefix = commonprefix(names)  # noqa: RUF071  (names, not paths)
        start = prefix[: prefix.rfind(".") + 1]
        starts = {start} if start else set()
        others = [n for r in rules if not r.mcore.startswith("mtp.") for n in r.hf]
        if any(n.startswith(start) for n in others):
            starts = {start + n.removeprefix(start).partition(".")[0] + "." for n in names}
        found += [Ignored(re.escape(each) + ".*", why) for each in sorted(starts)]
    return found
