"""One option as users see it: spellings, type, choices, default and help, from a group's field."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, TypeAliasType, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from mcore_core.config.group import ConfigGroup, Named
from mcore_core.errors import Problem, UsageError

type Shape = Literal["flag", "value", "list", "json"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option and where it comes from."""

    name: str
    field: FieldInfo
    group: type[ConfigGroup]
    plugin: str

    @property
    def members(self) -> tuple[Any, ...]:
        """The annotation's alternatives, without None."""
        return tuple(t for t in _members(self.field.annotation) if t is not type(None))

    @property
    def optional(self) -> bool:
        """True where none is a value."""
        return type(None) in _members(self.field.annotation)

    @property
    def shape(self) -> Shape:
        """What a command line may give: true or false, one value, several, or JSON."""
        kinds = {get_origin(t) or t for t in self.members}
        if bool in kinds:
            return "flag"
        if kinds & {list, tuple, set}:
            return "list"
        return "json" if kinds & {dict, Mapping} else "value"

    @property
    def item(self) -> Any:  # noqa: ANN401
        """The type of one value: of a list's items, else of the option itself."""
        kind = self.members[0]
        if self.shape == "list":
            return _unalias((get_args(kind) or (str,))[0])
        return kind

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that are allowed, or nothing where there is no such list."""
        return get_args(self.item) if get_origin(self.item) is Literal else ()

    @property
    def type_name(self) -> str:
        """Return the type as `mcore args --json` has it: bool, int, list[str], choice, json."""
        if self.shape == "json":
            return "json"
        item = "str" if self.choices else self.item.__name__
        if self.shape == "list":
            return f"list[{item}]"
        return "choice" if self.choices else str(item)

    @property
    def default(self) -> Any:  # noqa: ANN401
        """The default of the group; a recipe may have another."""
        return self.field.get_default(call_default_factory=True)

    @property
    def _extra(self) -> dict[str, Any]:
        extra = self.field.json_schema_extra
        return extra if isinstance(extra, dict) else {}

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other spellings."""
        return tuple(self._extra.get("aliases", ()))

    @property
    def names(self) -> Named | None:
        """What its value names, where that can be looked at before the run."""
        return self._extra.get("names")

    @property
    def secret(self) -> bool:
        """True where the value is never shown or written."""
        return bool(self._extra.get("secret"))

    @property
    def help(self) -> str:
        """The field's docstring on one line."""
        return " ".join((self.field.description or "").split())


def _unalias(annotation: Any) -> Any:  # noqa: ANN401
    return annotation.__value__ if isinstance(annotation, TypeAliasType) else annotation


def _members(annotation: Any) -> tuple[Any, ...]:  # noqa: ANN401
    plain = _unalias(annotation)
    if get_origin(plain) in (Union, UnionType):
        return tuple(_unalias(t) for t in get_args(plain))
    return (plain,)


def collect_options(groups: Mapping[type[ConfigGroup], str]) -> dict[str, Option]:
    """Return all options by name. Raises UsageError where two groups claim one spelling."""
    options: dict[str, Option] = {}
    spelled: dict[str, Option] = {}
    problems = []
    for group, plugin in groups.items():
        for name, field in group.model_fields.items():
            option = Option(name, field, group, plugin)
            for spelling in (name, *option.aliases):
                if other := spelled.get(spelling):
                    problems.append(_defined_twice(spelling, other, option))
                spelled[spelling] = option
            options[name] = option
    if problems:
        raise UsageError(problems)
    return options


def spellings(options: Mapping[str, Option]) -> dict[str, str]:
    """Return every spelling, aliases too, with the option's name."""
    return {s: name for name, option in options.items() for s in (name, *option.aliases)}


def _defined_twice(spelling: str, first: Option, second: Option) -> Problem:
    return Problem(
        "MC305",
        f"option --{spelling} is defined twice",
        [
            *(f"{o.plugin}  {o.group.__module__}.{o.group.__name__}" for o in (first, second)),
            "fix: rename one, or move the shared option to a group that both import",
        ],
    )
