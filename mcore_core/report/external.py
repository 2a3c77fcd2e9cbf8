"""The reporters that --report_to names, beside those that are always on."""

from collections.abc import Iterable

from mcore_core.component import Catalogue
from mcore_core.errors import Problem, UsageError, usage_error
from mcore_core.protocols import Reporter

BUILT_IN = ("console", "jsonl", "tensorboard")
"""Always on; naming one in --report_to is allowed and changes nothing. "none" likewise."""


def reporter_problems(
    names: Iterable[str], catalogue: Catalogue[type[Reporter]]
) -> Iterable[Problem]:
    """Yield a problem for each name of --report_to that nobody provides; imports nothing."""
    for name in external_names(names):
        try:
            catalogue.find(name, "--report_to")
        except UsageError as error:
            yield from error.problems


def external_names(names: Iterable[str]) -> list[str]:
    """Return the names that a plugin has to provide, each once."""
    return [n for n in dict.fromkeys(names) if n not in BUILT_IN and n != "none"]


def load_reporters(
    names: Iterable[str], catalogue: Catalogue[type[Reporter]]
) -> dict[str, type[Reporter]]:
    """Import the reporters that --report_to names."""
    classes: dict[str, type[Reporter]] = {}
    problems: list[Problem] = []
    for name in external_names(names):
        try:
            classes[name] = catalogue.find(name, "--report_to").load()
        except UsageError as error:
            problems.extend(error.problems)
        except ImportError as error:
            missing = usage_error(
                "MC203",
                f"the reporter {name!r} cannot be imported (from --report_to)",
                f"{type(error).__name__}: {error}",
                f"fix: pip install 'mcore-core[{name}]', or leave {name} out of --report_to",
            )
            problems.extend(missing.problems)
    if problems:
        raise UsageError(problems)
    return classes
