"""Merge defaults, YAML files and flags into one immutable RunConfig; report every problem."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from mcore_core.config.decode import decode, explain
from mcore_core.config.group import ConfigGroup, Named
from mcore_core.config.option import Option, collect_options, spellings
from mcore_core.config.source import COMMAND_LINE, Source
from mcore_core.errors import Problem, UsageError, did_you_mean


class RunConfig:
    """All option groups of one run: `config[TrainConfig].seed`, or `config.get("seed")`."""

    __slots__ = ("_defaults", "_groups", "_owner")

    def __init__(
        self, groups: Iterable[ConfigGroup], defaults: Mapping[str, Any] | None = None
    ) -> None:
        """Hold `groups`; `defaults` are those that a recipe has changed."""
        self._groups = {type(g): g for g in groups}
        self._owner = {n: g for g in self._groups for n in g.model_fields}
        self._defaults = dict(defaults or {})

    def __getitem__[G: ConfigGroup](self, group: type[G]) -> G:
        found = self._groups[group]
        assert isinstance(found, group)
        return found

    def __contains__(self, group: object) -> bool:
        return group in self._groups

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunConfig) and self._groups == other._groups

    def __hash__(self) -> int:
        return hash(frozenset(self._groups))

    def __repr__(self) -> str:
        given = {n: self.get(n) for n in self._owner if self.is_set(n) and not self._secret(n)}
        return f"RunConfig({', '.join(f'{k}={v!r}' for k, v in given.items())})"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all options."""
        return tuple(self._owner)

    def get(self, name: str) -> Any:  # noqa: ANN401
        """Return an option's value by its name. Raises KeyError where no group has it."""
        return getattr(self._groups[self._owner[name]], name)

    def is_set(self, name: str) -> bool:
        """Return whether a user, a file or `replace` gave the option, whatever the value."""
        return name in self._groups[self._owner[name]].model_fields_set

    def default(self, name: str) -> Any:  # noqa: ANN401
        """Return the option's default for this run's recipe."""
        if name in self._defaults:
            return self._defaults[name]
        return self._owner[name].model_fields[name].get_default(call_default_factory=True)

    def changed(self, name: str) -> bool:
        """Return whether the option has another value than its default."""
        return bool(self.get(name) != self.default(name))

    def replace(self, **values: Any) -> "RunConfig":  # noqa: ANN401
        """Return a config with other values, checked; they count as set. Raises UsageError."""
        groups = dict.fromkeys(self._groups, "")
        kept = {n: self.get(n) for n in self._owner if self.is_set(n)}
        source = Source("replace", {**kept, **values})
        return compose(groups, [source], defaults=self._defaults)

    def without(self, *names: str) -> "RunConfig":
        """Return a config in which these options are as if nobody had given them."""
        groups = dict.fromkeys(self._groups, "")
        kept = {n: self.get(n) for n in self._owner if self.is_set(n) and n not in names}
        return compose(groups, [Source("without", kept)], defaults=self._defaults)

    def dump(self) -> dict[str, Any]:
        """Return the flat options as JSON types; composing them again gives an equal config.

        Secrets are left out, and so are options of sparse groups that nobody gave.
        """
        flat: dict[str, Any] = {}
        for group in self._groups.values():
            names = group.model_fields_set if group.sparse else set(type(group).model_fields)
            include = {n for n in names if not self._secret(n)}
            flat |= group.model_dump(mode="json", include=include)
        return flat

    def naming(self) -> Iterator[tuple[str, Named, str]]:
        """Yield each file that an option names: the option, the kind, and what was given."""
        for name in self._owner:
            kind, value = self._option(name).names, self.get(name)
            if kind is not None and value is not None:
                yield from ((name, kind, v) for v in ([value] if isinstance(value, str) else value))

    def _option(self, name: str) -> Option:
        group = self._owner[name]
        return Option(name, group.model_fields[name], group, "")

    def _secret(self, name: str) -> bool:
        return self._option(name).secret


def compose(
    groups: Mapping[type[ConfigGroup], str],
    sources: Sequence[Source],
    *,
    inactive: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Merge `sources`, later ones winning.

    Args:
        groups: option groups and the plugin that each is from.
        sources: where options were given, least important first.
        inactive: options of plugins that are not active, and which plugin that is.
        defaults: defaults that the recipe changes.

    Raises:
        UsageError: holds a problem for each option that is unknown, given twice or wrong.
    """
    options = collect_options(groups)
    given: dict[str, tuple[Any, str]] = {}
    problems: list[Problem] = []
    for source in sources:
        found, wrong = _read(source, options, inactive or {})
        given |= found
        problems += wrong
    lower = {n: (v, f"default: {n}") for n, v in (defaults or {}).items() if n in options}
    built = []
    for group in groups:
        mine = {n: v for n, v in {**lower, **given}.items() if n in group.model_fields}
        built_group, wrong = _build(group, mine, options)
        problems += wrong
        set_here = {n for n in mine if n in given}
        built.append(group.model_construct(_fields_set=set_here, **dict(built_group)))
    if problems:
        raise UsageError(problems)
    return RunConfig(built, defaults)


def _read(
    source: Source, options: Mapping[str, Option], inactive: Mapping[str, str]
) -> tuple[dict[str, tuple[Any, str]], list[Problem]]:
    """Return name -> (value, where it stands), for the options of one source."""
    names = spellings(options)
    found: dict[str, tuple[Any, str]] = {}
    typed: dict[str, str] = {}
    problems = []
    for key, value in source.values.items():
        name = names.get(key.replace("-", "_"))
        if name is None:
            problems.append(_unknown(source, key, names, inactive))
        elif name in found:
            first, second = source.spell(typed[name]), source.spell(key)
            problems.append(
                Problem(
                    "MC306",
                    f"{second} and {first} are two spellings of one option",
                    [f"fix: keep one of them; {name} is the name"],
                )
            )
        else:
            found[name], typed[name] = (value, source.spell(key)), key
    return found, problems


def _build(
    group: type[ConfigGroup], values: Mapping[str, tuple[Any, str]], options: Mapping[str, Option]
) -> tuple[ConfigGroup, list[Problem]]:
    """Return the group, with defaults where a value is wrong, and what is wrong."""
    problems = []
    ready: dict[str, Any] = {}
    for name, (value, where) in values.items():
        try:
            ready[name] = decode(options[name], value)
        except ValueError as error:
            problems.append(Problem("MC302", f"{where}: {error}"))
    try:
        return group.model_validate(ready), problems
    except ValidationError as error:
        for item in error.errors():
            name, *inner = (str(part) for part in item["loc"] or ("",))
            if not name:
                text = item["msg"].removeprefix("Value error, ")
                problems.append(Problem("MC302", f"{group.title}: {text}"))
                continue
            what, hint = explain(options[name], item)
            inside = "".join(
                f" item {int(part) + 1}" if part.isdecimal() else f" {part!r}" for part in inner
            )
            notes = [hint] if hint else []
            problems.append(Problem("MC302", f"{values[name][1]}{inside}: {what}", notes))
        wrong = {str(item["loc"][0]) for item in error.errors() if item["loc"]}
        right = {n: v for n, v in ready.items() if n not in wrong}
        return group.model_construct(**right), problems


def _unknown(
    source: Source, key: str, names: Mapping[str, str], inactive: Mapping[str, str]
) -> Problem:
    name = key.replace("-", "_")
    message = f"unknown option {source.spell(key)}"
    if name in inactive:
        plugin = inactive[name]
        return Problem(
            "MC304",
            message,
            [
                f"it belongs to the plugin {plugin!r}, which is not active",
                f"fix: add it with --plugin {plugin}, or leave the option out",
            ],
        )
    hint = did_you_mean(name, names, "--" if source.name == COMMAND_LINE else "")
    return Problem("MC301", message, [hint or "fix: `mcore args` lists the options"])
