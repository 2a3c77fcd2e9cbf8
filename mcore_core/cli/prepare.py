"""From a command line to plugins and a composed config; shared by the commands."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mcore_core.cli.arguments import Arguments, parse
from mcore_core.config.compose import RunConfig, compose
from mcore_core.config.group import ConfigGroup
from mcore_core.config.kernel import KERNEL, KERNEL_GROUPS
from mcore_core.config.option import Option, collect_options
from mcore_core.config.source import COMMAND_LINE, Source, read_yaml
from mcore_core.errors import Problem, UsageError
from mcore_core.manager import PluginManager
from mcore_core.plugin import Plugin

type Groups = dict[type[ConfigGroup], str]
type Provided = list[tuple[type[ConfigGroup], str]]
"""Groups and the plugin that each is from; plugins that share a group each have it."""


@dataclass(slots=True)
class Session:
    """Plugins and option groups of one command, before and after plugins are chosen."""

    manager: PluginManager
    kernel: Groups
    provided: Provided
    """The groups of every installed plugin."""
    active: dict[str, Plugin] = field(default_factory=dict)

    @property
    def groups(self) -> Groups:
        """The kernel's groups and those of active plugins."""
        return self.kernel | {g: p for g, p in self.provided if p in self.active}

    @property
    def inactive(self) -> dict[str, str]:
        """Options of plugins that are not active, and which plugin that is."""
        others: dict[str, str] = {}
        for group, plugin in self.provided:
            if plugin not in self.active:
                for option in collect_options({group: plugin}).values():
                    for spelling in (option.name, *option.aliases):
                        others.setdefault(spelling, plugin)
        return others

    @property
    def options(self) -> dict[str, Option]:
        """Options of the kernel and of active plugins, then those of the others."""
        found = collect_options(self.groups)
        for group, plugin in self.provided:
            for option in collect_options({group: plugin}).values():
                found.setdefault(option.name, option)
        return found

    @property
    def defaults(self) -> dict[str, Any]:
        """Defaults that active plugins change. Raises UsageError for options nobody has."""
        known = collect_options(self.groups)
        merged: dict[str, Any] = {}
        problems = []
        for plugin, found in self.active.items():
            for name, value in found.defaults.items():
                if name in known:
                    merged[name] = value
                else:
                    problems.append(
                        Problem(
                            "MC111",
                            f"plugin {plugin!r} sets a default for --{name}, which is no option",
                            ["fix: report this to the plugin's author"],
                        )
                    )
        if problems:
            raise UsageError(problems)
        return merged

    @property
    def refusals(self) -> dict[str, tuple[str, str]]:
        """Options that active plugins refuse -> (plugin, reason)."""
        return {n: (p, why) for p, found in self.active.items() for n, why in found.refuses.items()}


def open_session(extra: Sequence[type[ConfigGroup]] = ()) -> Session:
    """Load the installed plugins and collect what they add."""
    manager = PluginManager()
    manager.load_installed()
    provided = [
        (group, plugin)
        for plugin, groups in manager.call_each("mcore_config_groups")
        for group in groups
    ]
    return Session(manager, dict.fromkeys((*extra, *KERNEL_GROUPS), KERNEL), provided)


@dataclass(frozen=True, slots=True)
class Request:
    """A command line and its YAML files, with the named plugins active in the session."""

    arguments: Arguments
    names: tuple[str, ...]
    files: tuple[Source, ...]


def read_request(session: Session, argv: Sequence[str]) -> Request:
    """Parse the command line, read its files and activate the plugins that either names.

    Plugins named on the command line replace those named in files.
    """
    first = parse(argv, session.options)
    names: list[str] = []
    files = []
    problems: list[Problem] = []
    for path in first.files:
        try:
            source = read_yaml(path)
        except UsageError as error:
            problems += error.problems
            continue
        values: dict[str, Any] = dict(source.values)
        named = values.pop("plugin", None) or []
        listed = named if isinstance(named, list) else str(named).split(",")
        names = [str(n).strip() for n in listed] or names
        files.append(Source(source.name, values, source.lines))
    if problems and not first.help:
        raise UsageError([*first.problems, *problems])
    names = names if first.plugins is None else first.plugins
    session.active = session.manager.activate(names)
    return Request(parse(argv, session.options), tuple(names), tuple(files))


def compose_request(session: Session, request: Request) -> RunConfig:
    """Merge defaults, files and the command line. Raises UsageError with every problem."""
    flags = Source(COMMAND_LINE, request.arguments.values)
    try:
        config = compose(
            session.groups,
            [*request.files, flags],
            inactive=session.inactive,
            defaults=session.defaults,
        )
    except UsageError as error:
        raise UsageError([*request.arguments.problems, *error.problems]) from None
    if request.arguments.problems:
        raise UsageError(request.arguments.problems)
    return config


def known_flags(argv: Sequence[str], command: str, flags: Sequence[str]) -> set[str]:
    """Return which of a small command's flags were given. Raises UsageError for others."""
    unknown = [token for token in argv if token not in flags]
    if unknown:
        raise UsageError(
            [
                Problem(
                    "MC002",
                    f"unexpected argument {token!r}",
                    [f"fix: mcore {command} takes {', '.join(flags)}"],
                )
                for token in unknown
            ]
        )
    return set(argv)
