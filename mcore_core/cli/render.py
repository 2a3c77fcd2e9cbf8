"""Options as text for a terminal: one section a title, each option with type, default and help."""

import shutil
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from mcore_core.config.decode import as_typed
from mcore_core.config.kernel import KERNEL
from mcore_core.config.option import Option

_WIDEST = 120
_NARROWEST = 40
_METAVARS = {"int": "INT", "float": "FLOAT", "str": "TEXT", "bool": "[true|false]", "json": "JSON"}


def width() -> int:
    """Return how wide text may be."""
    return max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size((80, 24)).columns)) - 1


def metavar(option: Option) -> str:
    """Return what stands for the value."""
    item = "|".join(option.choices) or _METAVARS[option.type_name.removeprefix("list[").rstrip("]")]
    return f"{item} ..." if option.shape == "list" else item


def render_options(options: Iterable[Option], defaults: Mapping[str, Any]) -> str:
    """Return all options in sections; `defaults` are those that plugins have changed."""
    sections: defaultdict[str, list[Option]] = defaultdict(list)
    for option in options:
        sections[option.group.title].append(option)
    blocks = []
    for title, members in sections.items():
        plugins = sorted({o.plugin for o in members} - {KERNEL})
        owner = f" [{', '.join(plugins)}]" if plugins else ""
        lines = [f"{title}{owner}:", *(render_option(o, defaults) for o in members)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def render_option(option: Option, defaults: Mapping[str, Any]) -> str:
    """Return one option: a line with its type and default, then its help."""
    names = ", ".join(f"--{name}" for name in (option.name, *option.aliases))
    default = as_typed(defaults.get(option.name, option.default))
    head = f"{names} {metavar(option)}  (default: {default})"
    return "\n".join(
        [
            *_wrap(head.replace("|", "\u200b|"), "  ", "      "),
            *_wrap(option.help, "      ", "      "),
        ]
    ).replace("\u200b", "")


def _wrap(text: str, first: str, later: str) -> list[str]:
    return textwrap.wrap(
        text,
        width(),
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )
