"""Split a command line into plugins, YAML files and options, by each option's shape."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mcore_core.config.option import Option, spellings
from mcore_core.errors import Problem, did_you_mean

YAML = (".yaml", ".yml")


@dataclass(slots=True)
class Arguments:
    """What was typed, not yet checked against types."""

    plugins: list[str] | None = None
    files: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    """By the spelling that was typed, in snake case."""
    help: bool = False
    problems: list[Problem] = field(default_factory=list)


def parse(argv: Sequence[str], options: Mapping[str, Option]) -> Arguments:
    """Read a command line. Options may be in snake or kebab case, values after a space or `=`.

    A true-or-false option may stand alone; a list takes all values up to the next option.
    """
    found = Arguments()
    names = spellings(options)
    rest = list(reversed(argv))
    while rest:
        token = rest.pop()
        if token in {"-h", "--help"}:
            found.help = True
        elif _is_option(token):
            key, equals, inline = token[2:].partition("=")
            key = key.replace("-", "_")
            shape = options[names[key]].shape if key in names else "unknown"
            shape = "list" if key == "plugin" else shape
            _store(found, key, shape, [inline] if equals else _take(rest, shape))
        elif token.endswith(YAML):
            found.files.append(token)
        else:
            found.problems.append(_unexpected(token, names))
    return found


def _is_option(token: str) -> bool:
    return token.startswith("--") and len(token) > 2


def _take(rest: list[str], shape: str) -> list[str]:
    """Take the values that belong to an option off the reversed command line."""
    taken: list[str] = []
    most = len(rest) if shape in {"list", "unknown"} else 1
    while rest and len(taken) < most and not _is_option(rest[-1]):
        if rest[-1].endswith(YAML) and shape not in {"value", "json"}:
            break
        if rest[-1] == "-h":
            break
        taken.append(rest.pop())
    return taken


def _store(found: Arguments, key: str, shape: str, taken: list[str]) -> None:
    if shape == "flag" and not taken:
        taken = ["true"]
    if shape != "unknown" and not taken:
        found.problems.append(
            Problem("MC003", f"--{key} needs a value", [f"fix: --{key} VALUE, or --{key}=VALUE"])
        )
    elif key == "plugin":
        names = [name for text in taken for name in text.split(",") if name]
        found.plugins = [*(found.plugins or []), *names]
    elif shape == "list":
        if key in found.values:
            both = " ".join([*found.values[key], *taken])
            found.problems.append(
                Problem("MC004", f"--{key} is given twice", [f"fix: --{key} {both}"])
            )
        found.values[key] = taken
    else:
        found.values[key] = taken[0] if taken else None


def _unexpected(token: str, names: Mapping[str, str]) -> Problem:
    bare = token.lstrip("-").replace("-", "_")
    hint = did_you_mean(bare, names, "--") if token.startswith("-") else ""
    fix = "fix: write options as --name value; files of options end in .yaml or .yml"
    return Problem("MC002", f"unexpected argument {token!r}", [hint, fix] if hint else [fix])
