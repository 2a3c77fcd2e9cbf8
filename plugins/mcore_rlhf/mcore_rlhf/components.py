"""Find what an option names: a plugin's component, or an object in a file of the user's."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

from mcore_core.component import Catalogue
from mcore_core.errors import Problem, UsageError, usage_error
from mcore_core.manager import PluginManager


@cache
def catalogue(hook: str) -> Catalogue[Any]:
    """Return what installed plugins list in a catalogue hook."""
    manager = PluginManager()
    manager.load_installed()
    return manager.catalogue(hook)


def is_file(name: str) -> bool:
    """Return whether an option names a file: ./FILE.py:NAME."""
    return name.rpartition(":")[0].endswith(".py")


def check(hook: str, name: str, option: str) -> list[Problem]:
    """Return what is wrong with a name, without importing anything."""
    if is_file(name):
        path = Path(name.rpartition(":")[0]).expanduser()
        if path.is_file():
            return []
        return [
            Problem("MC345", f"{path} does not exist (from {option})", ["fix: correct the path"])
        ]
    if name.endswith(".py"):
        fix = f"fix: {option} {name}:NAME, with the name of a function in it"
        return [Problem("MC345", f"{name} is a file, not a function (from {option})", [fix])]
    try:
        catalogue(hook).find(name, option)
    except UsageError as error:
        return list(error.problems)
    return []


def load(hook: str, name: str, option: str) -> Any:  # noqa: ANN401
    """Import what an option names.

    Raises:
        UsageError: There is no such component, file or object.
    """
    if not is_file(name):
        return catalogue(hook).find(name, option).load()
    file, _, attribute = name.rpartition(":")
    path = Path(file).expanduser().resolve()
    module = f"mcore_user_{path.stem}_{abs(hash(path))}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        sys.modules[module] = made
        try:
            spec.loader.exec_module(made)
        except Exception as error:
            del sys.modules[module]
            raise usage_error(
                "MC346",
                f"{path} cannot be imported (from {option})",
                f"{type(error).__name__}: {error}",
            ) from error
    found = getattr(sys.modules[module], attribute, None)
    if found is None:
        names = [n for n in vars(sys.modules[module]) if not n.startswith("_")]
        raise usage_error(
            "MC346", f"{path} has no {attribute!r} (from {option})", f"it has: {', '.join(names)}"
        )
    return found
