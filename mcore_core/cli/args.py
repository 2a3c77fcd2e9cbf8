"""`mcore args`: list options, with types, defaults and help."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mcore_core.cli.arguments import parse
from mcore_core.cli.prepare import Groups, Provided, known_flags, open_session
from mcore_core.cli.render import render_options
from mcore_core.config.export import ExportConfig
from mcore_core.config.kernel import KERNEL
from mcore_core.config.option import Option, collect_options
from mcore_core.errors import UsageError

USAGE = """\
usage: mcore args [--plugin NAME ...] [--json]

List the options of the kernel and of every installed plugin, or with --plugin of those plugins
only, with the defaults that they change.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    session = open_session()
    arguments = parse([token for token in argv if token != "--json"], {})
    if arguments.help:
        sys.stdout.write(USAGE)
        return 0
    if problems := arguments.problems:
        raise UsageError(problems)
    known_flags(
        [*arguments.files, *(f"--{name}" for name in arguments.values)],
        "args",
        ("--plugin NAME", "--json"),
    )
    if arguments.plugins is None:
        options = all_options(session.kernel | {ExportConfig: KERNEL}, session.provided)
        defaults: dict[str, Any] = {}
    else:
        session.active = session.manager.activate(arguments.plugins)
        options = list(collect_options(session.groups).values())
        defaults = session.defaults
    if "--json" in argv:
        json.dump([describe(o, defaults) for o in options], sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(render_options(options, defaults))
    return 0


def all_options(kernel: Groups, provided: Provided) -> list[Option]:
    """Return every option; those of different plugins may share a name."""
    options = list(collect_options(kernel).values())
    for group, plugin in provided:
        options += collect_options({group: plugin}).values()
    return options


def describe(option: Option, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return an option as JSON has it."""
    return {
        "name": option.name,
        "group": option.group.title,
        "plugin": option.plugin,
        "type": option.type_name,
        "choices": list(option.choices),
        "default": defaults.get(option.name, option.default),
        "aliases": list(option.aliases),
        "help": option.help,
    }
