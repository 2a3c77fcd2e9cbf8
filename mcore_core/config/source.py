"""Where options are given: the command line, or a YAML file with its line numbers."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from mcore_core.errors import Problem, UsageError, usage_error

COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Source:
    """Values by name as they were spelled, and how to point at each in a message."""

    name: str
    values: Mapping[str, Any]
    lines: Mapping[str, int] = field(default_factory=dict)

    def spell(self, name: str) -> str:
        """Return `--name`, or `file:line: name`."""
        if self.name == COMMAND_LINE:
            return f"--{name}"
        if line := self.lines.get(name):
            return f"{self.name}:{line}: {name}"
        return f"{self.name}: {name}"


class _Loader(yaml.SafeLoader):
    """Reads dates as text: no option is a date, but names of runs look like one."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own way)
        first: [(tag, regexp) for tag, regexp in pairs if tag != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(path: str) -> Source:
    """Read a YAML file of `option: value` lines.

    Raises:
        UsageError: the file cannot be read, is not YAML, is not flat, or has a key twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise usage_error(
            "MC309",
            f"cannot read the options file {path!r}: {reason}",
            "fix: give the path of a YAML file of 'option: value' lines",
        ) from error
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return Source(path, {})
        if not isinstance(root, yaml.MappingNode):
            raise usage_error(
                "MC303",
                f"{path}:{root.start_mark.line + 1}: expected 'option: value' lines",
                "fix: write one option a line, for example 'lr: 1e-5'",
            )
        _check_keys(path, root)
        loader.flatten_mapping(root)
        values = loader.construct_document(root)
    except yaml.YAMLError as error:
        raise _not_yaml(path, error) from error
    finally:
        loader.dispose()
    lines = {k.value: k.start_mark.line + 1 for k, _ in root.value}
    return Source(path, {str(k): v for k, v in values.items()}, lines)


def _check_keys(path: str, root: yaml.MappingNode) -> None:
    problems = []
    nodes: list[yaml.Node] = [root]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes.extend(node.value)
        if not isinstance(node, yaml.MappingNode):
            continue
        seen: dict[Hashable, int] = {}
        for key, value in node.value:
            nodes.append(value)
            line = key.start_mark.line + 1
            name = key.value if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen and name != "<<":
                problems.append(
                    Problem(
                        "MC307",
                        f"{path}:{line}: {name!r} is already given on line {seen[name]}",
                        ["fix: keep one of the two lines"],
                    )
                )
            seen[name] = line
    if problems:
        raise UsageError(problems)


def _not_yaml(path: str, error: yaml.YAMLError) -> UsageError:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}" if mark else path
    what = getattr(error, "problem", None) or str(error).partition("\n")[0]
    context = getattr(error, "context", None)
    return usage_error(
        "MC308",
        f"{where}: not valid YAML: {f'{context}, ' if context else ''}{what}",
        "fix: write 'option: value' with a space after the colon; quote text that has ': ' or '#'",
    )
