"""Options as a report lists them: by help section, with what the user set, and without secrets."""

import json
import re
from dataclasses import dataclass

from mcore_core.config.compose import RunConfig
from mcore_core.config.kernel import KERNEL_GROUPS

OTHERS = "Recipe and plugins"
_PLAIN = re.compile(r"[^\s\"'#,\[\]{}][^\"'#\n]*")


@dataclass(frozen=True, slots=True)
class OptionLine:
    """One option of one run."""

    name: str
    value: str
    given: bool
    """True where the user gave it."""


def option_groups(config: RunConfig) -> dict[str, list[OptionLine]]:
    """Return the options by section, in the order of help.

    What `RunConfig.dump` leaves out is shown as "(hidden)" where it was given, and not at all
    where it was not: a secret, or an option that then means "as the checkpoint says".
    """
    titles = {name: group.title for group in KERNEL_GROUPS for name in group.model_fields}
    values = config.dump()
    groups: dict[str, list[OptionLine]] = {}
    for name in config.names:
        given = config.is_set(name)
        if name in values or given:
            value = show(values[name]) if name in values else "(hidden)"
            lines = groups.setdefault(titles.get(name, OTHERS), [])
            lines.append(OptionLine(name, value, given))
    return groups


def show(value: object) -> str:
    """Return a value as it would be typed."""
    if value is None:
        return "none"
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False)
